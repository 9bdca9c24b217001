"""CSV with a header: a sequence a row, in a column."""

import csv
import io
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

from shards.write.formats.format import Format
from shards.write.formats.values import in_lists, no_column
from t5vae.common.errors import UserError

if TYPE_CHECKING:
    import pyarrow


def read_csv(stream: IO[bytes], name: str, column: str | None) -> Iterator[list[str]]:
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    rows = csv.DictReader(lines)
    try:
        if column not in (rows.fieldnames or ()):
            raise no_column(name, column, rows.fieldnames or ())
        yield from in_lists(row[column] or "" for row in rows)
    except csv.Error as error:
        raise UserError(f"{name}, line {rows.line_num}: {error}") from None
    finally:
        lines.detach()  # which would close the stream


def read_table(path: str, columns: "pyarrow.Schema") -> "pyarrow.Table":
    import pyarrow.csv

    options = pyarrow.csv.ConvertOptions(
        column_types=columns, include_columns=columns.names, null_values=["", "nan", "NaN"]
    )
    return pyarrow.csv.read_csv(path, convert_options=options)


CSV = Format(
    read_csv,
    suffixes=(".csv", ".csv.gz", ".csv.zst"),
    has_columns=True,
    read_table=read_table,
)
