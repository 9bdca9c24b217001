"""Text: a sequence a line."""

import codecs
from collections.abc import Iterator
from typing import IO

from shards.write.formats.format import Format
from shards.write.streams import CHUNK
from t5vae.common.errors import UserError


def read_text(stream: IO[bytes], name: str, column: str | None) -> Iterator[list[str]]:
    chunk = stream.read(CHUNK).removeprefix(codecs.BOM_UTF8)
    while chunk:
        text = (chunk + stream.readline()).decode()
        if "\0" in text:
            raise UserError(f"{name} is a binary file (it holds zero bytes), not text")
        lines = text.removesuffix("\n").split("\n")
        yield [line.rstrip("\r") for line in lines] if "\r" in text else lines
        chunk = stream.read(CHUNK)


TEXT = Format(read_text, suffixes=("",), help="has one sequence a line")
