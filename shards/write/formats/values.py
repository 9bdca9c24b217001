"""What readers of several formats do with the values they find."""

from collections.abc import Iterable, Iterator
from typing import Any

from shards.write.streams import CHUNK
from t5vae.common.errors import UserError

ROWS = 4096


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


def no_column(name: str, column: str | None, columns: Iterable[str]) -> UserError:
    """The error of a file without the column."""
    return UserError(f"{name} has no column {column!r}; it has: {', '.join(columns)}")


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
