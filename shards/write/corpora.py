"""Corpora: where sequences come from.

A corpus is a fixed list of files; a reading is one pass over some of them.
"""

import errno
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import compress
from pathlib import Path, PurePosixPath
from typing import Any

from shards.storage.requests import check_url
from shards.write.formats import FORMATS, format_of
from shards.write.formats.format import Format
from shards.write.formats.values import ROWS, BadRow
from shards.write.streams import CHUNK, Tap, decompressed, drain, is_url, open_raw
from t5vae.common.errors import UserError, first_line
from t5vae.common.files import reading
from t5vae.common.storage import WEATHER, patiently

BAD_ROW = "bad row"  # a reason to leave one out
# What file systems of fsspec call what changes with a file.
VERSIONS = (
    *("ETag", "etag", "mtime", "updated", "created"),
    *("LastModified", "Last-Modified", "last_modified", "Content-MD5"),
)


class BadRowError(UserError):
    """A row of a file that is none."""


@dataclass(frozen=True)
class File:
    """A file of a corpus."""

    path: str
    """A path, or a URL that fsspec opens."""
    bytes: int
    """0 if unknown."""
    stamp: str
    """Changes when the file does; empty if nothing is known that does."""


class Corpus:
    """The files of a source, found at once and in a fixed order.

    Args:
        source: a file, folder or glob, or an fsspec URL of one ("s3://bucket/folder"); None for
            what the format reads then: with "python" the running interpreter's standard library.
        format: a name in `shards.write.formats.FORMATS`: "text" has one sequence a line, "python"
            every statement that fits one line and parses alone, "webdataset" one a record. None
            for what the files' names say.
        column: where the text lies, for formats that have columns: a field or, for "webdataset",
            the extension of the records' member that holds the text or, if it ends in "npy", the
            token ids. None lets a format find it in the first file, if it can.
        name: what to call the corpus, the last part of the source if None.

    Attributes:
        format: the format.
        format_name: its name.
        files: the files, sorted.
        kind: "text", or "tokens" where a sequence is an array of token ids.

    Raises:
        UserError: nothing found at source, an unknown format, or a column missing or superfluous.
    """

    def __init__(
        self,
        source: str | Path | None,
        format: str | None = None,
        column: str | None = None,
        name: str | None = None,
    ):
        if format is not None and format not in FORMATS:
            raise UserError(f"unknown format {format!r}: choose one of {', '.join(FORMATS)}")
        if source is None:
            default = FORMATS[format or "text"].default
            if default is None:
                raise UserError(
                    f"format {format or 'text'} needs a source: a file, folder, glob or '-'"
                )
            source, name = default.folder, name or default.name
        if is_url(source):
            check_url(str(source))
        # What follows the name in a URL of HTTP may be a signature.
        told = str(source).partition("?")[0] if str(source).startswith("http") else source
        self.name = name or Path(told).name
        find = _find_url if is_url(source) else _find
        self.files = find(str(source), FORMATS[format or "text"])
        if not self.files:
            raise UserError(f"no {format or 'text'} files in {source}")
        self.format_name = format or self._format_by_names(source)
        self.format = FORMATS[self.format_name]
        self.column = self._find_column(column, ", by its name" if format is None else "")
        self.kind = self.format.kind(self.column)

    def _format_by_names(self, source: str | Path) -> str:
        found = sorted({format_of(file.path) for file in self.files})
        if len(found) > 1:
            raise UserError(
                f"{source} holds {' and '.join(found)} files: choose those of one format"
            )
        return found[0]

    def _find_column(self, column: str | None, how: str) -> str | None:
        """The column, as given or found by the format; `how` the format is known, for people."""
        path, format = self.files[0].path, self.format
        is_what = f"{self.name} is read as {self.format_name}{how}"
        if not format.has_columns:
            if column is not None:
                raise UserError(f"{is_what}: that has no columns, so leave --column out")
        elif column is None:
            with reading(path), Tap(open_raw(path)) as raw:
                stream = decompressed(raw, path)
                if format.find_column:
                    return format.find_column(stream, path)
                there = format.list_columns(stream, path) if format.list_columns else []
                has = f"; it has: {', '.join(there)}" if there else ""
                raise UserError(f"{is_what}: name the text's column (--column){has}")
        return column

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
        bad_rows: what one does: "error", or "skip" to count it.

    Attributes:
        skipped: what was left out so far, by reason. "unparsable file" counts files, the others,
            such as "empty" and "bad row", count sequences.
        bad_rows: those that were skipped, a line for people each.
        digests: the hex sha256 of the bytes of each file read to its end.
        bytes_read: how many bytes were read, as they are stored.
    """

    def __init__(
        self, files: Sequence[File], format: Format, column: str | None, bad_rows: str = "error"
    ):
        self.files = files
        self.format = format
        self.column = column
        self.skip_bad_rows = bad_rows == "skip"
        self.skipped: Counter[str] = Counter()
        self.bad_rows: list[str] = []
        self.digests: list[str] = []
        self.bytes_read = 0

    def __iter__(self) -> Iterator[list[Any]]:
        """Yield lists of sequences that are not empty, in the order of the files.

        A sequence is a str or, of kind "tokens", the bytes of a little-endian int32 array.

        Raises:
            BadRowError: a row that is none.
            UserError: a file that is not what its format says, naming the file.
        """
        for _, items in self.numbered():
            yield items

    def numbered(self) -> Iterator[tuple[list[int], list[Any]]]:
        """The same, with the number of each sequence's row: from 0 on, all rows and files counted.

        A row is what the format takes for one, be it empty or bad: a line, a record, a statement.
        """
        rows: list[int] = []
        held: list[Any] = []
        begun = number = 0
        for items in self._read():
            numbers = range(number, number + len(items))
            number += len(items)
            if all(map(_holds_something, items)):
                rows += numbers
                held += items
            else:
                kept = [self._is_kept(item) for item in items]
                rows += compress(numbers, kept)
                held += compress(items, kept)
            if len(held) >= ROWS or (held and self.bytes_read - begun >= CHUNK):
                yield rows, held
                rows, held = [], []
                begun = self.bytes_read
        if held:
            yield rows, held

    def _is_kept(self, item: Any) -> bool:
        if isinstance(item, BadRow):
            if not self.skip_bad_rows:
                raise BadRowError(str(item))
            self.skipped[BAD_ROW] += 1
            self.bad_rows.append(str(item))
        elif not _holds_something(item):
            self.skipped["empty"] += 1
        else:
            return True
        return False

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


def _holds_something(item: Any) -> bool:
    """Whether a sequence is not empty: a text that is no white space alone, or some bytes."""
    return bool(item.strip() if isinstance(item, str) else isinstance(item, bytes) and item)


def table_rows(corpus: Corpus, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The rows of a corpus of tables, as tuples of some columns' values.

    Raises:
        BadRowError: a row that is none.
        UserError: as of a `Reading`.
    """
    assert corpus.format.read_rows is not None
    for file in corpus.files:
        with reading(file.path), Tap(open_raw(file.path)) as raw:
            stream = decompressed(raw, file.path)
            for rows in corpus.format.read_rows(stream, file.path, columns):
                for row in rows:
                    if isinstance(row, BadRow):
                        raise BadRowError(str(row))
                    yield row


def combine(digests: Iterable[str]) -> str:
    """The hex sha256 of hex digests' bytes, one after the other."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def _find(source: str, format: Format) -> list[File]:
    with reading(source):
        return patiently(lambda: _list(source, format), source)


def _list(source: str, format: Format) -> list[File]:
    path = Path(source)
    found: Iterable[Path]
    if stat.S_ISREG(_mode(path)):
        return [_file(path)]
    if stat.S_ISDIR(_mode(path)):
        found = (p for p in _inside(path) if format.claims(p.relative_to(path)))
    elif has_magic(source):
        found = map(Path, glob(source, recursive=True))
    else:
        raise UserError(f"{source} does not exist: give a file, a folder or a glob")
    return [_file(path) for path in sorted(found) if stat.S_ISREG(_mode(path))]


def _inside(folder: Path) -> Iterator[Path]:
    """All that is no folder; folders that may not be read are passed over."""

    def fail(error: OSError) -> None:
        if error.errno in WEATHER:
            raise error

    for parent, _, names in os.walk(folder, onerror=fail):
        yield from (Path(parent, name) for name in names)


def _mode(path: Path) -> int:
    """Of a file or folder, 0 where there is none; to Path.is_file() one that fails may be none."""
    try:
        return path.stat().st_mode
    except ValueError:  # a zero byte
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return 0


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
            told = any(info.get(name) for name in VERSIONS)
            stamp = hashlib.sha256(repr(info).encode()).hexdigest() if told else ""
            url = f"{head}{path}{tail}" if same else filesystem.unstrip_protocol(path)
            files.append(File(url, info["size"] or 0, stamp))
    return files
