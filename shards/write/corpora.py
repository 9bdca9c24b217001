"""Corpora: where sequences come from.

A corpus is a fixed list of files; a reading is one pass over some of them.
"""

import hashlib
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Literal

from shards.write.readers import READERS, ROWS, is_array, member_extensions
from shards.write.streams import CHUNK, Tap, decompressed, drain, is_url, open_raw
from t5vae.common.errors import UserError, first_line
from t5vae.common.files import reading

SUFFIXES: dict[str, tuple[str, ...]] = {
    "text": ("",),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "csv": (".csv", ".csv.gz", ".csv.zst"),
    "parquet": (".parquet",),
    "python": (".py",),
    "webdataset": (".tar", ".tar.gz", ".tar.zst"),
}
WITH_COLUMN = ("jsonl", "csv", "parquet")
INSTALLED = {"site-packages", "dist-packages"}
TEXT_MEMBERS = ("txt", "text")


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
        source: a file, folder or glob, or an fsspec URL of one ("s3://bucket/folder"); None, with
            format "python", for the running interpreter's standard library.
        format: "text" (one sequence a line), "jsonl", "csv", "parquet", "python" (every statement
            that fits one line and parses alone), or "webdataset" (one sequence a record of tar
            files).
        column: the field that holds the text, for "jsonl", "csv" and "parquet"; for "webdataset"
            the extension of the records' member that holds the text or, if it ends in "npy", the
            token ids: found in the first file if None.
        name: what to call the corpus, the last part of the source if None.

    Attributes:
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
        if format not in SUFFIXES:
            raise UserError(f"unknown format {format!r}: choose one of {', '.join(SUFFIXES)}")
        if format in WITH_COLUMN and column is None:
            raise UserError(f"format {format} needs the name of the text's column (--column)")
        if format not in (*WITH_COLUMN, "webdataset") and column is not None:
            raise UserError(f"format {format} has no columns: leave --column out")
        if source is None and format == "python":
            version = ".".join(map(str, sys.version_info[:3]))
            self.name = name or f"standard library of Python {version}"
            self.files = _find(sysconfig.get_path("stdlib"), format)
        elif source is None:
            raise UserError(f"format {format} needs a source: a file, folder, glob or '-'")
        else:
            self.name = name or Path(source).name
            self.files = _find_url(str(source), format) if is_url(source) else _find(source, format)
        if format == "webdataset" and column is None:
            column = _find_column(self.files[0].path)
        self.format = format
        self.column = column
        self.kind: Literal["text", "tokens"] = _kind(format, column)

    def describe(self) -> dict[str, Any]:
        """What is to be read, without reading it: name, format, number of files and their bytes."""
        return {
            "source": self.name,
            "format": self.format,
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

    def __init__(self, files: Sequence[File], format: str, column: str | None):
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
        tokens = _kind(self.format, self.column) == "tokens"
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
                    for items in READERS[self.format](stream, file.path, self.column):
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


def _kind(format: str, column: str | None) -> Literal["text", "tokens"]:
    arrays = format == "webdataset" and column is not None and is_array(column)
    return "tokens" if arrays else "text"


def _find_column(path: str) -> str:
    with reading(path), Tap(open_raw(path)) as raw:
        there = member_extensions(decompressed(raw, path))
    candidates = [e for e in there if e in TEXT_MEMBERS or is_array(e)]
    if len(candidates) != 1:
        raise UserError(
            f"{path}: name the members that hold the text or the token ids (--column); "
            f"there are: {', '.join(there) or 'none'}"
        )
    return candidates[0]


def _find(source: str | Path, format: str) -> list[File]:
    path = Path(source)
    if path.is_file():
        found = [path]
    elif path.is_dir():
        named = (p for suffix in SUFFIXES[format] for p in path.rglob(f"*{suffix}"))
        found = [p for p in named if _belongs(p.relative_to(path), format) and p.is_file()]
    elif has_magic(str(source)):
        found = [Path(p) for p in glob(str(source), recursive=True) if Path(p).is_file()]
    else:
        raise UserError(f"{source} does not exist: give a file, a folder or a glob")
    if not found:
        raise UserError(f"no {format} files in {source}")
    return [_file(path) for path in sorted(found)]


def _file(path: Path) -> File:
    status = path.stat()
    return File(str(path), status.st_size, f"{status.st_size} {status.st_mtime_ns}")


def _find_url(source: str, format: str) -> list[File]:
    try:
        found = _list_url(source, format)
    except FileNotFoundError as error:
        if error.__cause__ is None:
            raise UserError(f"{source} does not exist: give a file, a folder or a glob") from None
        raise UserError(f"cannot read {source}: {first_line(error.__cause__)}") from None
    except Exception as error:  # each storage library raises its own kinds
        raise UserError(f"cannot read {source}: {first_line(error)}") from None
    if not found:
        raise UserError(f"no {format} files in {source}")
    return found


def _list_url(source: str, format: str) -> list[File]:
    from fsspec.core import url_to_fs

    filesystem, root = url_to_fs(source)
    try:
        paths = [root]
        if filesystem.info(root)["type"] == "directory" or root.endswith("/"):
            inside = ((path, path.removeprefix(root).lstrip("/")) for path in filesystem.find(root))
            paths = [path for path, rest in inside if _belongs(PurePosixPath(rest), format)]
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


def _belongs(relative: PurePath, format: str) -> bool:
    """Whether a file in a folder is meant: not hidden, named as its format is, not installed."""
    return (
        relative.name.endswith(SUFFIXES[format])
        and not any(part.startswith(".") for part in relative.parts)
        and not (format == "python" and INSTALLED.intersection(relative.parts[:-1]))
    )
