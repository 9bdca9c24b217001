"""Text: a sequence a line."""

import codecs
from collections.abc import Iterator
from typing import IO, Any

from shards.write.formats.format import Format
from shards.write.formats.values import LONGEST, BadRow
from shards.write.streams import CHUNK
from t5vae.common.errors import UserError

BINARY = "is a binary file (it holds zero bytes), not text"


def read_text(stream: IO[bytes], name: str, column: str | None) -> Iterator[list[Any]]:
    """Lines, which \\n ends, or \\r\\n; bad rows in place of those of more than 64 MiB."""
    before = 0
    chunk = stream.read(CHUNK).removeprefix(codecs.BOM_UTF8)
    while chunk:
        rest = stream.readline(LONGEST)
        cut = len(rest) == LONGEST and not rest.endswith(b"\n")
        if cut:
            if b"\0" in rest:
                raise UserError(f"{name} {BINARY}")
            while stream.readline(CHUNK)[-1:] not in (b"\n", b""):
                pass
            chunk, rest = chunk[: chunk.rfind(b"\n") + 1], b""
        text = (chunk + rest).decode()
        if "\0" in text:
            raise UserError(f"{name} {BINARY}")
        lines: list[Any] = text.removesuffix("\n").split("\n") if text else []
        before += len(lines)
        if "\r" in text:
            lines = [line.rstrip("\r") for line in lines]
        if cut:
            before += 1
            why = f"a line of more than {LONGEST / 2**20:.0f} MiB"
            lines.append(BadRow(f"{name}, line {before}", why))
        yield lines
        chunk = stream.read(CHUNK)


TEXT = Format(read_text, suffixes=("",), help="has one sequence a line")
