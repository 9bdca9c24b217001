"""Corpora: where sequences of text come from.

A corpus is a list of files and a reader that turns one open file into texts. Readers stream:
nothing here holds more than one file's text.
"""

import ast
import csv
import gzip
import hashlib
import io
import json
import sys
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from shards.errors import UserError

BATCH = 8192
SUFFIXES = {
    "text": (),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "csv": (".csv", ".csv.gz", ".csv.zst"),
    "parquet": (".parquet",),
    "python": (".py",),
}
WITH_COLUMN = ("jsonl", "csv", "parquet")
INSTALLED = {"site-packages", "dist-packages"}


class Corpus:
    """The texts of a source, in a fixed order.

    Args:
        source: a file, folder or glob; "-" for standard input; None, with format "python", for
            the running interpreter's standard library.
        format: "text" (one sequence a line), "jsonl", "csv", "parquet", or "python" (every
            statement that fits one line and parses alone).
        column: the field that holds the text; for "jsonl", "csv" and "parquet".

    Attributes:
        skipped: what the last reading left out, by reason. "empty" counts texts, "unparsable
            file" counts files.

    Raises:
        UserError: nothing found at source, an unknown format, or a column missing or superfluous.
    """

    def __init__(self, source: str | Path | None, format: str = "text", column: str | None = None):
        if format not in SUFFIXES:
            raise UserError(f"unknown format {format!r}: choose one of {', '.join(SUFFIXES)}")
        if format in WITH_COLUMN and column is None:
            raise UserError(f"format {format} needs the name of the text's column (--column)")
        if format not in WITH_COLUMN and column is not None:
            raise UserError(f"format {format} has no columns: leave --column out")
        self.format = format
        self.column = column
        self.skipped: Counter[str] = Counter()
        self._stdin: bytes | None = None
        if source is None and format == "python":
            version = ".".join(map(str, sys.version_info[:3]))
            self.name = f"standard library of Python {version}"
            self.files = _python_files(Path(sysconfig.get_path("stdlib")))
        elif source is None:
            raise UserError(f"format {format} needs a source: a file, folder, glob or '-'")
        elif str(source) == "-":
            self.name = "-"
            self.files = []
            self._stdin = sys.stdin.buffer.read()
        else:
            self.name = Path(source).name
            self.files = _find(str(source), format)

    def describe(self) -> dict[str, Any]:
        """What is read, by content: name, number of files, their bytes and one sha256 of all."""
        digest = hashlib.sha256()
        size = 0
        for _, stream in self._open_all(raw=True):
            content = hashlib.file_digest(stream, "sha256").digest()  # type: ignore[arg-type]
            size += stream.tell()
            digest.update(content)
        return {
            "source": self.name,
            "format": self.format,
            "column": self.column,
            "sha256": digest.hexdigest(),
            "files": len(self.files),
            "bytes": size,
        }

    def __iter__(self) -> Iterator[list[str]]:
        """Yield lists of up to 8,192 non-empty texts.

        Raises:
            UserError: a file that is not what its format says, naming the file.
        """
        self.skipped.clear()
        texts = self._texts()
        while batch := list(islice(texts, BATCH)):
            kept = [text for text in batch if text and not text.isspace()]
            if len(kept) < len(batch):
                self.skipped["empty"] += len(batch) - len(kept)
            if kept:
                yield kept

    def _texts(self) -> Iterator[str]:
        for name, stream in self._open_all():
            try:
                if self.format == "text":
                    yield from _read_text(stream, name)
                elif self.format == "python":
                    try:
                        yield from _statements(stream)
                    except (SyntaxError, ValueError, RecursionError):
                        self.skipped["unparsable file"] += 1
                elif self.format == "jsonl":
                    yield from _read_jsonl(stream, name, self.column)
                elif self.format == "csv":
                    yield from _read_csv(stream, name, self.column)
                else:
                    yield from _read_parquet(stream, name, self.column)
            except UnicodeDecodeError as error:
                raise UserError(f"{name} is not UTF-8 text ({error.reason})") from None
            except (EOFError, OSError) as error:
                raise UserError(f"cannot read {name}: {error}") from None

    def _open_all(self, raw: bool = False) -> Iterator[tuple[str, BinaryIO]]:
        if self._stdin is not None:
            yield "standard input", io.BytesIO(self._stdin)
        for path in self.files:
            with _open(path, raw) as stream:
                yield str(path), stream


def _find(source: str, format: str) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir() and format == "python":
        found = _python_files(path)
    elif path.is_dir():
        found = [p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path))]
        found = [p for p in found if not SUFFIXES[format] or p.name.endswith(SUFFIXES[format])]
    elif has_magic(source):
        found = [Path(p) for p in glob(source, recursive=True) if Path(p).is_file()]
    else:
        raise UserError(f"{source} does not exist: give a file, a folder or a glob")
    if not found:
        raise UserError(f"no {format} files in {source}")
    return sorted(found)


def _python_files(root: Path) -> list[Path]:
    inside = ((path, path.relative_to(root)) for path in root.rglob("*.py"))
    return sorted(p for p, r in inside if not INSTALLED & set(r.parts[:-1]) and not _hidden(r))


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _open(path: Path, raw: bool) -> BinaryIO:
    try:
        if raw or path.suffix not in (".gz", ".zst"):
            return open(path, "rb")
        if path.suffix == ".gz":
            return gzip.open(path, "rb")  # type: ignore[return-value]
        import pyarrow

        return pyarrow.input_stream(path, compression="zstd")  # reads all frames, sees a cut
    except OSError as error:
        raise UserError(f"cannot open {path}: {error.strerror}") from None


def _lines(stream: BinaryIO, name: str) -> Iterator[str]:
    for line in io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n"):
        if "\0" in line:
            raise UserError(f"{name} is a binary file (it holds zero bytes), not text")
        yield line.rstrip("\r\n")


_read_text = _lines


def _read_jsonl(stream: BinaryIO, name: str, column: str | None) -> Iterator[str]:
    for number, line in enumerate(_lines(stream, name), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            raise UserError(f"{name}, line {number}: not a JSON object") from None
        if not isinstance(record, dict) or column not in record:
            fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise UserError(f"{name}, line {number}: no field {column!r}; it has: {fields}")
        yield _as_text(record[column], f"{name}, line {number}")


def _read_csv(stream: BinaryIO, name: str, column: str | None) -> Iterator[str]:
    rows = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
    try:
        if column not in (rows.fieldnames or ()):
            raise UserError(_no_column(name, column, rows.fieldnames or ()))
        for row in rows:
            yield row[column] or ""
    except csv.Error as error:
        raise UserError(f"{name}, line {rows.line_num}: {error}") from None


def _read_parquet(stream: BinaryIO, name: str, column: str | None) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(stream)
        if column not in table.schema_arrow.names:
            raise UserError(_no_column(name, column, table.schema_arrow.names))
        for batch in table.iter_batches(batch_size=BATCH, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield _as_text(value, name)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{name} is not a parquet file: {error}") from None


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


def _statements(stream: BinaryIO) -> Iterator[str]:
    """The statements of a Python file that fit one line and parse alone, indentation removed.

    One-line compound statements (`if x: y`) count, and so do the statements inside them. Strings
    that stand alone (docstrings) are prose and left out.
    """
    encoding, _ = tokenize.detect_encoding(stream.readline)
    stream.seek(0)
    text = io.TextIOWrapper(stream, encoding=encoding).read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old code's escapes are not this user's concern
        tree = ast.parse(text)
        lines = text.split("\n")
        for node in _walk(tree.body):
            if node.lineno != node.end_lineno or _is_string(node):
                continue
            line = lines[node.lineno - 1].encode()  # ast counts columns in bytes
            statement = line[node.col_offset : node.end_col_offset].decode()
            if not isinstance(node, ast.If) or _parses(statement):  # an `elif` is an ast.If too
                yield statement


def _walk(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        for name in ("body", "handlers", "cases", "orelse", "finalbody"):
            for part in getattr(node, name, ()):
                yield from _walk([part] if isinstance(part, ast.stmt) else part.body)


def _is_string(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _parses(statement: str) -> bool:
    try:
        ast.parse(statement)
    except SyntaxError:
        return False
    return True
