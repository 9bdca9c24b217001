"""Readers: the sequences of one open file, format by format.

A reader takes a stream of decompressed bytes, the file's name (its path or URL) and a column, and
yields lists of sequences: str, or the bytes of little-endian int32 token ids. Empty ones are
yielded too.
"""

import codecs
import csv
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, islice
from operator import itemgetter
from typing import IO, Any

import numpy as np

from shards.write.statements import read_python
from shards.write.streams import CHUNK, drain, open_raw
from t5vae.common.errors import UserError, first_line

ROWS = 4096
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # WebDataset's key and extension


def read_text(stream: IO[bytes], name: str, column: str | None) -> Iterator[list[str]]:
    chunk = stream.read(CHUNK).removeprefix(codecs.BOM_UTF8)
    while chunk:
        text = (chunk + stream.readline()).decode()
        if "\0" in text:
            raise UserError(f"{name} is a binary file (it holds zero bytes), not text")
        lines = text.removesuffix("\n").split("\n")
        yield [line.rstrip("\r") for line in lines] if "\r" in text else lines
        chunk = stream.read(CHUNK)


def read_jsonl(stream: IO[bytes], name: str, column: str | None) -> Iterator[list[str]]:
    before = 0
    for lines in read_text(stream, name, column):
        yield [
            _json_text(line, f"{name}, line {number}", column)
            for number, line in enumerate(lines, before + 1)
            if line and not line.isspace()
        ]
        before += len(lines)


def _json_text(line: str, where: str, column: str | None) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: not a JSON object") from None
    if not isinstance(record, dict) or column not in record:
        fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where}: no field {column!r}; it has: {fields}")
    return _as_text(record[column], where)


def read_csv(stream: IO[bytes], name: str, column: str | None) -> Iterator[list[str]]:
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    rows = csv.DictReader(lines)
    try:
        if column not in (rows.fieldnames or ()):
            raise UserError(_no_column(name, column, rows.fieldnames or ()))
        yield from _lists(row[column] or "" for row in rows)
    except csv.Error as error:
        raise UserError(f"{name}, line {rows.line_num}: {error}") from None
    finally:
        lines.detach()  # which would close the stream


def read_parquet(stream: IO[bytes], name: str, column: str | None) -> Iterator[list[str]]:
    import pyarrow
    import pyarrow.parquet

    drain(stream)  # a parquet file is read from its end
    try:
        with open_raw(name) as seekable:
            table = pyarrow.parquet.ParquetFile(seekable)
            if column not in table.schema_arrow.names:
                raise UserError(_no_column(name, column, table.schema_arrow.names))
            for batch in table.iter_batches(batch_size=ROWS, columns=[column]):
                yield [_as_text(value, name) for value in batch.column(0).to_pylist()]
    except pyarrow.ArrowException as error:
        raise UserError(f"{name} is not a parquet file: {first_line(error)}") from None


def _no_column(name: str, column: str | None, columns: Iterable[str]) -> str:
    return f"{name} has no column {column!r}; it has: {', '.join(columns)}"


def _as_text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {value!r:.40} is not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON's escapes can spell half a surrogate pair
            raise UserError(f"{where}: {value!r:.40} is not valid Unicode") from None
    return value


def read_webdataset(stream: IO[bytes], name: str, column: str | None) -> Iterator[list[Any]]:
    parse = _token_bytes if column is not None and is_array(column) else _member_text
    yield from _lists(
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


def member_extensions(stream: IO[bytes]) -> list[str]:
    """The extensions that the members of a tar file's first 100 records have."""
    records = islice(_tar_records(stream), 100)
    return sorted({extension for _, members in records for _, extension, _ in members})


def is_array(extension: str) -> bool:
    """Whether a record's member holds token ids."""
    return extension == "npy" or extension.endswith(".npy")


Member = tuple[str, str, Callable[[], bytes]]  # key, extension, read


def _tar_records(stream: IO[bytes]) -> Iterator[tuple[str, Iterator[Member]]]:
    """Groups of members with one key; a member is to be read before the next."""
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as archive:
        yield from groupby(_tar_members(archive), itemgetter(0))


def _tar_members(archive: tarfile.TarFile) -> Iterator[Member]:
    for header in iter(archive.next, None):
        archive.members.clear()  # type: ignore[attr-defined] # it would keep them all
        name = MEMBER.fullmatch(header.name)
        if name and header.isreg() and (file := archive.extractfile(header)):
            yield name[1], name[2].lower(), file.read


class _Header(tarfile.TarInfo):
    """A header without which a tar file may end only where its end is marked."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:  # which tarfile takes for the end
            raise tarfile.ReadError(str(error)) from None


def _member_text(content: bytes, where: str) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text ({error.reason})") from None
    if "\0" in text:
        raise UserError(f"{where} is binary (it holds zero bytes), not text")
    return text.removesuffix("\n").removesuffix("\r")


def _token_bytes(content: bytes, where: str) -> bytes:
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


def _lists(items: Iterable[Any]) -> Iterator[list[Any]]:
    """Lists of at most some thousands of items and little more than a MiB."""
    held: list[Any] = []
    size = 0
    for item in items:
        held.append(item)
        size += len(item)
        if len(held) == ROWS or size >= CHUNK:
            yield held
            held, size = [], 0
    yield held


READERS: dict[str, Callable[[IO[bytes], str, str | None], Iterator[list[Any]]]] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "parquet": read_parquet,
    "python": read_python,
    "webdataset": read_webdataset,
}
