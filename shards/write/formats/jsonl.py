"""JSON Lines: a sequence a line, in a field of its object."""

import json
from collections.abc import Iterator, Sequence
from typing import IO, Any

from shards.write.formats.format import Format
from shards.write.formats.text import read_text
from shards.write.formats.values import BadRow, as_text


class _Pairs(list):
    """The fields of an object, as they stand in the file."""


def read_jsonl(stream: IO[bytes], name: str, column: str | None) -> Iterator[list[Any]]:
    for records in _records(stream, name, (column,)):
        yield [_text(record, where, column) for record, where in records]


def read_rows(stream: IO[bytes], name: str, columns: Sequence[str | None]) -> Iterator[list[Any]]:
    """Rows as tuples of the fields' values, None where there is none."""
    for records in _records(stream, name, columns):
        yield [
            record if isinstance(record, BadRow) else tuple(map(record.get, columns))
            for record, _ in records
        ]


def list_columns(stream: IO[bytes], name: str) -> list[str]:
    records = next(_records(stream, name, ()), [])
    return list(records[0][0]) if records and isinstance(records[0][0], dict) else []


def _records(
    stream: IO[bytes], name: str, columns: Sequence[str | None]
) -> Iterator[list[tuple[Any, str]]]:
    """The objects of a file, and where each stands; blank lines are none."""
    before = 0
    for lines in read_text(stream, name, None):
        numbered = ((line, f"{name}, line {n}") for n, line in enumerate(lines, before + 1))
        yield [
            (_record(line, where, columns), where) for line, where in numbered if not _blank(line)
        ]
        before += len(lines)


def _blank(line: Any) -> bool:
    return isinstance(line, str) and (not line or line.isspace())


def _record(line: Any, where: str, columns: Sequence[str | None]) -> Any:
    if isinstance(line, BadRow):
        return line
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return BadRow(where, "not a JSON object")
    if not isinstance(record, dict):
        return BadRow(where, f"not a JSON object, but {type(record).__name__}")
    for column in columns:
        if line.count(f'"{column}"') > 1:  # which may be a field's value too
            names = [name for name, _ in json.loads(line, object_pairs_hook=_Pairs)]
            if names.count(column) > 1:
                return BadRow(where, f"the field {column!r} is given {names.count(column)} times")
    return record


def _text(record: Any, where: str, column: str | None) -> Any:
    if isinstance(record, BadRow):
        return record
    if column not in record:
        return BadRow(where, f"no field {column!r}; it has: {', '.join(record)}")
    return as_text(record[column], where)


JSONL = Format(
    read_jsonl,
    suffixes=(".jsonl", ".jsonl.gz", ".jsonl.zst"),
    has_columns=True,
    read_rows=read_rows,
    list_columns=list_columns,
)
