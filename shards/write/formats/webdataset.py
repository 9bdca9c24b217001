"""WebDataset: a sequence a record of tar files, in the member with one extension.

It is text or, where the extension ends in "npy", an array of token ids.
"""

import io
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from typing import IO, Any

from shards.write.formats.format import Format, Kind
from shards.write.formats.values import LONGEST, in_lists
from t5vae.common.errors import UserError, first_line

EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
TEXT_MEMBERS = ("txt", "text")
LONGEST_MEMBER = 2**36  # bytes: to pass over one takes its time
LONGEST_EXTENSION = 2**20  # bytes of a long name or of other attributes of a member
NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # key and extension


def read_webdataset(stream: IO[bytes], name: str, column: str | None) -> Iterator[list[Any]]:
    parse = _token_bytes if kind(column) == "tokens" else _member_text
    yield from in_lists(
        parse(content, f"{name}, record {key!r}") for key, content in _members(stream, name, column)
    )


def _members(stream: IO[bytes], name: str, column: str | None) -> Iterator[tuple[str, bytes]]:
    for key, members in _tar_records(stream):
        record: dict[str, bytes] = {}
        for _, extension, read in members:
            if extension in record:
                raise UserError(f"{name}, record {key!r}: more than one member {extension!r}")
            record[extension] = read() if extension == column else b""
        if column not in record:
            raise UserError(
                f"{name}, record {key!r}: no member {column!r}; it has: {', '.join(record)}"
            )
        yield key, record[column]


def find_column(stream: IO[bytes], name: str) -> str:
    """The one extension among the first 100 records' that holds sequences.

    Raises:
        UserError: there is none, or there are several.
    """
    records = islice(_tar_records(stream), 100)
    there = sorted({extension for _, members in records for _, extension, _ in members})
    candidates = [e for e in there if e in TEXT_MEMBERS or kind(e) == "tokens"]
    if len(candidates) != 1:
        raise UserError(
            f"{name}: name the members that hold the text or the token ids (--column); "
            f"there are: {', '.join(there) or 'none'}"
        )
    return candidates[0]


def kind(column: str | None) -> Kind:
    """What a record's member holds."""
    return "tokens" if column and (column == "npy" or column.endswith(".npy")) else "text"


Member = tuple[str, str, Callable[[], bytes]]  # key, extension, read


def _tar_records(stream: IO[bytes]) -> Iterator[tuple[str, Iterator[Member]]]:
    """Groups of members with one key; a member is to be read before the next."""
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as archive:
        yield from groupby(_tar_members(archive), itemgetter(0))


def _tar_members(archive: tarfile.TarFile) -> Iterator[Member]:
    for header in iter(archive.next, None):
        archive.members.clear()  # type: ignore[attr-defined] # it would keep them all
        name = NAME.fullmatch(header.name)
        if name and header.isreg() and (file := archive.extractfile(header)):
            yield name[1], name[2].lower(), partial(_read, file, header)


def _read(file: IO[bytes], header: tarfile.TarInfo) -> bytes:
    if header.size > LONGEST:
        most = f"{LONGEST / 2**20:.0f} MiB"
        raise tarfile.ReadError(f"the member {header.name!r:.100} is of more than {most}")
    return file.read()


class _Header(tarfile.TarInfo):
    """A header without which a tar file may end only where its end is marked."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.type in EXTENSIONS and not 0 <= header.size <= LONGEST_EXTENSION:
            raise tarfile.InvalidHeaderError("too long")  # type: ignore[attr-defined]
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        try:
            header = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except RecursionError:  # headers of headers of headers
            raise tarfile.ReadError("too many headers of one member") from None
        except tarfile.HeaderError as error:  # which tarfile takes for the end
            raise tarfile.ReadError(str(error)) from None
        if not 0 <= header.size <= LONGEST_MEMBER:
            raise tarfile.ReadError(f"a member of {header.size:,} bytes")
        return header


def _member_text(content: bytes, where: str) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text ({error.reason})") from None
    if "\0" in text:
        raise UserError(f"{where} is binary (it holds zero bytes), not text")
    return text.removesuffix("\n").removesuffix("\r")


def _token_bytes(content: bytes, where: str) -> bytes:
    import numpy as np

    try:
        ids = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # numpy's header parser raises half a dozen kinds
        raise UserError(f"{where} is no .npy array ({first_line(error)})") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UserError(
            f"{where}: token ids are a 1-D array of integers, not {ids.ndim}-D of {ids.dtype}"
        )
    if ids.size and not 0 <= ids.min() <= ids.max() < 2**31:
        raise UserError(f"{where}: token ids {ids.min()} to {ids.max()}: they start at 0")
    return ids.astype("<i4").tobytes()


WEBDATASET = Format(
    read_webdataset,
    suffixes=(".tar", ".tar.gz", ".tar.zst"),
    help="one sequence a record of tar files",
    has_columns=True,
    find_column=find_column,
    kind=kind,
)
