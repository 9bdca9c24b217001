"""Tables of texts and their values, from files."""

import math
from collections import Counter
from typing import Any

from shards.write.corpora import Corpus, table_rows
from shards.write.formats import FORMATS, format_of
from t5vae.common.errors import UserError


def read_values(path: str, column: str, values: str) -> tuple[list[str], list[float], Counter[str]]:
    """Read texts and their values.

    Args:
        path: a file of a format that reads tables: .csv, .jsonl, .parquet; the first two may be .gz
            or .zst.
        column: the field that holds the text.
        values: the field that holds its value; nan where it is missing.

    Returns:
        N texts and N values, and how many rows were left out, by reason: those without a text.

    Raises:
        UserError: no such file or field, another format, or values that are no numbers.
    """
    if FORMATS[format_of(path)].read_rows is None:
        *others, last = sorted(f.suffixes[0] for f in FORMATS.values() if f.read_rows)
        raise UserError(f"{path} is no table: give a {', '.join(others)} or {last} file")
    corpus = Corpus(path, None, column)
    left_out: Counter[str] = Counter()
    texts: list[str] = []
    numbers: list[float] = []
    for number, (text, value) in enumerate(table_rows(corpus, (column, values))):
        where = f"{corpus.name}, row {number} (from 0)"
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: {text!r:.40} is not text")
        if not (text and text.strip()):
            left_out["empty"] += 1
            continue
        texts.append(text)
        numbers.append(_number(value, f"{where}, field {values!r}"))
    if all(map(math.isnan, numbers)):
        raise UserError(f"{path} has no rows with both {column!r} and {values!r}")
    return texts, numbers, left_out


def _number(value: Any, where: str) -> float:
    """A cell as a number; nan where it is empty."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {value!r:.40} is no number") from None
