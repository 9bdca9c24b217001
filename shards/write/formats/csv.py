"""CSV with a header: a sequence a row, in a column."""

import csv
import io
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import IO, Any

from shards.write.formats.format import Format
from shards.write.formats.text import BINARY
from shards.write.formats.values import LONGEST, ROWS, BadRow, firsts, place_of
from shards.write.streams import CHUNK
from t5vae.common.errors import UserError

LONGEST_CELL = 16 * 2**20  # characters
TOO_LONG = f"a line of more than {LONGEST / 2**20:.0f} MiB"
WHY = {
    "unexpected end of data": "a quote is opened here and never closed",
    "',' expected after '\"'": "text follows a closing quote: double the quotes inside a cell",
    f"field larger than field limit ({LONGEST_CELL})": (
        f"a cell of more than {LONGEST_CELL / 2**20:.0f} MiB: is a quote opened here that is never "
        "closed?"
    ),
}


def read_csv(stream: IO[bytes], name: str, column: str | None) -> Iterator[list[Any]]:
    yield from map(firsts, read_rows(stream, name, (column,)))


def read_rows(stream: IO[bytes], name: str, columns: Sequence[str | None]) -> Iterator[list[Any]]:
    """Rows as tuples of the columns' cells, "" where a row ends before; blank lines are no rows."""
    csv.field_size_limit(LONGEST_CELL)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    lines = _Lines(text, name)
    rows = _rows(lines, name)
    try:
        header = _header(rows)
        places = [place_of(name, column, header) for column in columns]
        held: list[Any] = []
        size = 0
        for row in rows:
            if isinstance(row, BadRow):
                held.append(row)
            elif len(row) > len(header):
                more = f"{len(row)} cells, the header has {len(header)}: quote cells with commas"
                held.append(BadRow(f"{name}, line {lines.begin}", more))
            elif row:
                cells = tuple(row[place] if place < len(row) else "" for place in places)
                held.append(cells)
                size += sum(map(len, cells))
            if len(held) == ROWS or size >= CHUNK:
                yield held
                held, size = [], 0
        yield held
    finally:
        text.detach()  # which would close the stream


def list_columns(stream: IO[bytes], name: str) -> list[str]:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    try:
        return _header(_rows(_Lines(text, name), name))
    finally:
        text.detach()


def _header(rows: Iterator[Any]) -> list[str]:
    header: Any = next(rows, [])
    if isinstance(header, BadRow):
        raise UserError(str(header))
    return header


class _Lines:
    """The lines of a file, those of the present row kept: one that is bad may have taken others in.

    Attributes:
        begin: the number of the line at which the present row begins, from 1.
        row: its lines so far.
    """

    def __init__(self, text: IO[str], name: str):
        self.name, self.begin, self.row = name, 1, list[str]()
        self._text, self._again = text, deque[str]()
        self._lines = iter(partial(text.readline, LONGEST), "")

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self._read()
        self.row.append(line)
        if _is_cut(line, LONGEST):
            raise csv.Error(TOO_LONG)
        return line

    def _read(self) -> str:
        """The next line, or the beginning of one that is too long."""
        line = next(self._lines)
        if "\0" in line:
            raise UserError(f"{self.name} {BINARY}")
        if _is_cut(line, LONGEST):
            while _is_cut(self._text.readline(CHUNK), CHUNK):
                pass
        return line

    def begin_row(self) -> None:
        """The row is read: the next one begins."""
        self.begin += len(self.row)
        self.row = []

    def give_up_row(self) -> None:
        """Only the row's first line belongs to it: the others are read again."""
        self._again.extendleft(reversed(self.row[1:]))
        self.row = self.row[:1]


def _is_cut(line: str, size: int) -> bool:
    return len(line) == size and not line.endswith(("\n", "\r"))


def _rows(lines: _Lines, name: str) -> Iterator[Any]:
    """Rows, lists of cells, and bad rows in the place of lines that are none."""
    while True:
        rows = csv.reader(lines, strict=True)
        try:
            for row in rows:
                yield row
                lines.begin_row()
            return
        except csv.Error as error:
            lines.give_up_row()
            why = WHY.get(str(error), str(error))
            yield BadRow(f"{name}, line {lines.begin}", why)
            lines.begin_row()


CSV = Format(
    read_csv,
    suffixes=(".csv", ".csv.gz", ".csv.zst"),
    has_columns=True,
    read_rows=read_rows,
    list_columns=list_columns,
)
