"""Corpora: where sequences come from.

A corpus is a fixed list of files; a reading is one pass over some of them.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path, PurePosixPath
from typing import Any

from shards.write.formats import FORMATS
from shards.write.formats.format import Format
from shards.write.formats.values import ROWS
from shards.write.streams import CHUNK, Tap, decompressed, drain, is_url, open_raw
from t5vae.common.errors import UserError, first_line
from t5vae.common.files import reading


@dataclass(frozen=True)
class File:
    """A file of a corpus."""

    path: str
    """A path, or a URL that fsspec opens."""
    bytes: int
    """0 if unknown."""
    stamp: str
    """Changes when the file does."""


class Corpus:
    """The files of a source, found at once and in a fixed order.

    Args:
        source: a file, folder or glob, or an fsspec URL of one ("s3://bucket/folder"); None for
            what the format reads then: with "python" the running interpreter's standard library.
        format: a name in `shards.write.formats.FORMATS`: "text" has one sequence a line, "python"
            every statement that fits one line and parses alone, "webdataset" one a record.
        column: where the text lies, for formats that have columns: a field or, for "webdataset",
            the extension of the records' member that holds the text or, if it ends in "npy", the
            token ids. None lets a format find it in the first file, if it can.
        name: what to call the corpus, the last part of the source if None.

    Attributes:
        format: the format.
        files: the files, sorted.
        kind: "text", or "tokens" where a sequence is an array of token ids.

    Raises:
        UserError: nothing found at source, an unknown format, or a column missing or superfluous.
    """

    def __init__(
        self,
        source: str | Path | None,
        format: str = "text",
        column: str | None = None,
        name: str | None = None,
    ):
        if format not in FORMATS:
            raise UserError(f"unknown format {format!r}: choose one of {', '.join(FORMATS)}")
        self.format = FORMATS[format]
        if self.format.has_columns and not self.format.find_column and column is None:
            raise UserError(f"format {format} needs the name of the text's column (--column)")
        if not self.format.has_columns and column is not None:
            raise UserError(f"format {format} has no columns: leave --column out")
        if source is None:
            if self.format.default is None:
                raise UserError(f"format {format} needs a source: a file, folder, glob or '-'")
            source, name = self.format.default.folder, name or self.format.default.name
        self.name = name or Path(source).name
        find = _find_url if is_url(source) else _find
        self.files = find(str(source), self.format)
        if not self.files:
            raise UserError(f"no {format} files in {source}")
        if self.format.find_column and column is None:
            path = self.files[0].path
            with reading(path), Tap(open_raw(path)) as raw:
                column = self.format.find_column(decompressed(raw, path), path)
        self.format_name = format
        self.column = column
        self.kind = self.format.kind(column)

    def describe(self) -> dict[str, Any]:
        """What is to be read, without reading it: name, format, number of files and their bytes."""
        return {
            "source": self.name,
            "format": self.format_name,
            "column": self.column,
            "files": len(self.files),
            "bytes": sum(file.bytes for file in self.files),
        }

    def sha256(self) -> str:
        """Read all files: `combine` of the sha256 of each one's bytes, as they are stored."""
        digests = []
        for file in self.files:
            with reading(file.path), Tap(open_raw(file.path)) as raw:
                drain(raw)
                digests.append(raw.hexdigest())
        return combine(digests)


class Reading:
    """One pass over some files of a corpus: iterate over it once.

    Args:
        files, format, column: the corpus's, or some of its files.

    Attributes:
        skipped: what was left out so far, by reason. "empty" counts sequences, "unparsable file"
            counts files.
        digests: the hex sha256 of the bytes of each file read to its end.
        bytes_read: how many bytes were read, as they are stored.
    """

    def __init__(self, files: Sequence[File], format: Format, column: str | None):
        self.files = files
        self.format = format
        self.column = column
        self.skipped: Counter[str] = Counter()
        self.digests: list[str] = []
        self.bytes_read = 0

    def __iter__(self) -> Iterator[list[Any]]:
        """Yield lists of sequences that are not empty, in the order of the files.

        A sequence is a str or, of kind "tokens", the bytes of a little-endian int32 array.

        Raises:
            UserError: a file that is not what its format says, naming the file.
        """
        tokens = self.format.kind(self.column) == "tokens"
        held: list[Any] = []
        begun = 0
        for items in self._read():
            kept = [item for item in items if item and (tokens or not item.isspace())]
            if len(kept) < len(items):
                self.skipped["empty"] += len(items) - len(kept)
            held += kept
            if len(held) >= ROWS or (held and self.bytes_read - begun >= CHUNK):
                yield held
                held = []
                begun = self.bytes_read
        if held:
            yield held

    def _read(self) -> Iterator[list[Any]]:
        for file in self.files:
            before = self.bytes_read
            with reading(file.path), Tap(open_raw(file.path)) as raw:
                stream = decompressed(raw, file.path)
                try:
                    for items in self.format.read(stream, file.path, self.column):
                        self.bytes_read = before + raw.tell()
                        yield items
                except SyntaxError:
                    self.skipped["unparsable file"] += 1
                drain(stream)
                self.bytes_read = before + raw.tell()
                self.digests.append(raw.hexdigest())


def combine(digests: Iterable[str]) -> str:
    """The hex sha256 of hex digests' bytes, one after the other."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def _find(source: str, format: Format) -> list[File]:
    path = Path(source)
    if path.is_file():
        found = [path]
    elif path.is_dir():
        inside = path.rglob("*")
        found = [p for p in inside if format.claims(p.relative_to(path)) and p.is_file()]
    elif has_magic(source):
        found = [Path(p) for p in glob(source, recursive=True) if Path(p).is_file()]
    else:
        raise UserError(f"{source} does not exist: give a file, a folder or a glob")
    return [_file(path) for path in sorted(found)]


def _file(path: Path) -> File:
    status = path.stat()
    return File(str(path), status.st_size, f"{status.st_size} {status.st_mtime_ns}")


def _find_url(source: str, format: Format) -> list[File]:
    try:
        return _list_url(source, format)
    except FileNotFoundError as error:
        if error.__cause__ is None:
            raise UserError(f"{source} does not exist: give a file, a folder or a glob") from None
        raise UserError(f"cannot read {source}: {first_line(error.__cause__)}") from None
    except Exception as error:  # each storage library raises its own kinds
        raise UserError(f"cannot read {source}: {first_line(error)}") from None


def _list_url(source: str, format: Format) -> list[File]:
    from fsspec.core import url_to_fs

    filesystem, root = url_to_fs(source)
    try:
        paths = [root]
        if filesystem.info(root)["type"] == "directory" or root.endswith("/"):
            inside = ((path, path.removeprefix(root).lstrip("/")) for path in filesystem.find(root))
            paths = [path for path, rest in inside if format.claims(PurePosixPath(rest))]
    except FileNotFoundError:
        if not has_magic(root):
            raise
        paths = [p for p in filesystem.glob(root) if not PurePosixPath(p).name.startswith(".")]
    head, same, tail = source.rstrip("/").rpartition(root) if root else ("", "", "")
    files = []
    for path in sorted(paths):
        info = filesystem.info(path)
        if info["type"] == "file":
            info.pop("url", None)  # where a redirect led: may be signed anew each time
            stamp = hashlib.sha256(repr(info).encode()).hexdigest()
            url = f"{head}{path}{tail}" if same else filesystem.unstrip_protocol(path)
            files.append(File(url, info["size"] or 0, stamp))
    return files
