"""Parquet: a sequence a row, in a column."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from shards.write.formats.format import Format
from shards.write.formats.values import ROWS, as_text, place_of
from shards.write.streams import drain, open_raw
from t5vae.common.errors import UserError, first_line

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile


def read_parquet(stream: IO[bytes], name: str, column: str | None) -> Iterator[list[str]]:
    for rows in read_rows(stream, name, (column,)):
        yield [as_text(value, name) for (value,) in rows]


def read_rows(stream: IO[bytes], name: str, columns: Sequence[str | None]) -> Iterator[list[Any]]:
    """Rows as tuples of the columns' values, None where there is none."""
    with _opened(name) as table:
        drain(stream)  # a parquet file is read from its end
        for column in columns:
            place_of(name, column, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=ROWS, columns=list(columns)):
            values = (batch.column(str(column)).to_pylist() for column in columns)
            yield list(zip(*values, strict=True))


def list_columns(stream: IO[bytes], name: str) -> list[str]:
    with _opened(name) as table:
        return table.schema_arrow.names


@contextmanager
def _opened(name: str) -> Iterator["ParquetFile"]:
    import pyarrow
    import pyarrow.parquet

    try:
        with open_raw(name) as seekable:
            yield pyarrow.parquet.ParquetFile(seekable)
    except pyarrow.ArrowException as error:
        raise UserError(f"{name} is not a parquet file: {first_line(error)}") from None


PARQUET = Format(
    read_parquet,
    suffixes=(".parquet",),
    has_columns=True,
    read_rows=read_rows,
    list_columns=list_columns,
)
