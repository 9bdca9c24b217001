"""What readers of several formats do with the values they find."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from shards.write.streams import CHUNK
from t5vae.common.errors import UserError

ROWS = 4096
LONGEST = 64 * 2**20  # bytes of a line


@dataclass(frozen=True)
class BadRow:
    """Stands among the sequences for a row that is none."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


def as_text(value: Any, where: str) -> str:
    """A value as a sequence; "" for None.

    Raises:
        UserError: it is not text, or not valid Unicode.
    """
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


def place_of(name: str, column: str | None, columns: list[str]) -> int:
    """Where a column lies among those of a file.

    Raises:
        UserError: it has none of that name, or several.
    """
    count = columns.count(column or "")
    if not count:
        there = ", ".join(columns) or "none"
        raise UserError(f"{name} has no column {column!r}; it has: {there}")
    if count > 1:
        raise UserError(f"{name} has {count} columns {column!r}: give each a name of its own")
    return columns.index(column or "")


def firsts(rows: list[Any]) -> list[Any]:
    """The first value of each row; bad rows stay."""
    return [row if isinstance(row, BadRow) else row[0] for row in rows]


def in_lists(items: Iterable[Any]) -> Iterator[list[Any]]:
    """Lists of at most some thousands of items and little more than a MiB."""
    held: list[Any] = []
    size = 0
    for item in items:
        held.append(item)
        size += len(item)
        if len(held) == ROWS or size >= CHUNK:
            yield held
            held, size = [], 0
    yield held
