"""JSON Lines: a sequence a line, in a field of its object."""

import json
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

from shards.write.formats.format import Format
from shards.write.formats.text import read_text
from shards.write.formats.values import as_text
from t5vae.common.errors import UserError

if TYPE_CHECKING:
    import pyarrow


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
    return as_text(record[column], where)


def read_table(path: str, columns: "pyarrow.Schema") -> "pyarrow.Table":
    import pyarrow.json

    options = pyarrow.json.ParseOptions(explicit_schema=columns, unexpected_field_behavior="ignore")
    return pyarrow.json.read_json(path, parse_options=options)


JSONL = Format(
    read_jsonl,
    suffixes=(".jsonl", ".jsonl.gz", ".jsonl.zst"),
    has_columns=True,
    read_table=read_table,
)
