"""Tables of texts and their values, from files."""

import pyarrow

from shards.write.formats import FORMATS, format_of
from t5vae.common.errors import UserError


def read_values(path: str, column: str, values: str) -> tuple[list[str], list[float]]:
    """Read texts and their values.

    Args:
        path: a file of a format that reads tables: .csv, .jsonl, .parquet; the first two may be .gz
            or .zst.
        column: the field that holds the text.
        values: the field that holds its value; nan where it is missing.

    Returns:
        N texts and N values; rows without a text are left out.

    Raises:
        UserError: no such file or field, another format, or values that are no numbers.
    """
    wanted = pyarrow.schema([(column, pyarrow.string()), (values, pyarrow.float64())])
    read_table = FORMATS[format_of(path)].read_table
    if read_table is None:
        *others, last = sorted(f.suffixes[0] for f in FORMATS.values() if f.read_table)
        raise UserError(f"{path} is no table: give a {', '.join(others)} or {last} file")
    try:
        table = read_table(path, wanted)
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as a table: {reason}") from None
    rows = [row for row in table.to_pylist() if row[column]]
    if not any(row[values] is not None for row in rows):
        raise UserError(f"{path} has no rows with both {column!r} and {values!r}")
    numbers = [float("nan") if row[values] is None else row[values] for row in rows]
    return [row[column] for row in rows], numbers
