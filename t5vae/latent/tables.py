"""Tables of texts and their values, from files."""

import pyarrow
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from shards.write.corpora import SUFFIXES
from t5vae.common.errors import UserError


def read_values(path: str, column: str, values: str) -> tuple[list[str], list[float]]:
    """Read texts and their values.

    Args:
        path: a .csv, .jsonl or .parquet file; the first two may be .gz or .zst.
        column: the field that holds the text.
        values: the field that holds its value; nan where it is missing.

    Returns:
        N texts and N values; rows without a text are left out.

    Raises:
        UserError: no such file or field, another format, or values that are no numbers.
    """
    wanted = pyarrow.schema([(column, pyarrow.string()), (values, pyarrow.float64())])
    try:
        if path.endswith(SUFFIXES["csv"]):
            options = pyarrow.csv.ConvertOptions(
                column_types=wanted, include_columns=wanted.names, null_values=["", "nan", "NaN"]
            )
            table = pyarrow.csv.read_csv(path, convert_options=options)
        elif path.endswith(SUFFIXES["jsonl"]):
            options = pyarrow.json.ParseOptions(
                explicit_schema=wanted, unexpected_field_behavior="ignore"
            )
            table = pyarrow.json.read_json(path, parse_options=options)
        elif path.endswith(SUFFIXES["parquet"]):
            table = pyarrow.parquet.read_table(path, columns=wanted.names).cast(wanted)
        else:
            raise UserError(f"{path} is no table: give a .csv, .jsonl or .parquet file")
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as a table: {reason}") from None
    rows = [row for row in table.to_pylist() if row[column]]
    if not any(row[values] is not None for row in rows):
        raise UserError(f"{path} has no rows with both {column!r} and {values!r}")
    numbers = [float("nan") if row[values] is None else row[values] for row in rows]
    return [row[column] for row in rows], numbers
