"""Parquet: a sequence a row, in a column."""

from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

from shards.write.formats.format import Format
from shards.write.formats.values import ROWS, as_text, no_column
from shards.write.streams import drain, open_raw
from t5vae.common.errors import UserError, first_line

if TYPE_CHECKING:
    import pyarrow


def read_parquet(stream: IO[bytes], name: str, column: str | None) -> Iterator[list[str]]:
    import pyarrow
    import pyarrow.parquet

    drain(stream)  # a parquet file is read from its end
    try:
        with open_raw(name) as seekable:
            table = pyarrow.parquet.ParquetFile(seekable)
            if column not in table.schema_arrow.names:
                raise no_column(name, column, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=ROWS, columns=[column]):
                yield [as_text(value, name) for value in batch.column(0).to_pylist()]
    except pyarrow.ArrowException as error:
        raise UserError(f"{name} is not a parquet file: {first_line(error)}") from None


def read_table(path: str, columns: "pyarrow.Schema") -> "pyarrow.Table":
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path, columns=columns.names).cast(columns)


PARQUET = Format(read_parquet, suffixes=(".parquet",), has_columns=True, read_table=read_table)
