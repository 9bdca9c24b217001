"""What changed between two texts."""

import re
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

_PIECE = re.compile(r"\w+|\s+|.", re.DOTALL)  # a word, spaces, any other character


@dataclass(frozen=True)
class Part:
    """A part of a text, before and after; equal where nothing changed."""

    old: str
    new: str


def difference(old: str, new: str) -> list[Part]:
    """The parts of two texts in order, with as few changed words and signs as can be.

    Returns:
        Parts whose `old`s joined are `old`, whose `new`s joined are `new`; no two neighbours are
        both changed, or both unchanged.
    """
    before, after = _PIECE.findall(old), _PIECE.findall(new)
    parts: list[Part] = []
    for edit in Levenshtein.opcodes(before, after):
        part = Part(
            "".join(before[edit.src_start : edit.src_end]),
            "".join(after[edit.dest_start : edit.dest_end]),
        )
        if parts and (parts[-1].old == parts[-1].new) == (part.old == part.new):
            part = Part(parts[-1].old + part.old, parts.pop().new + part.new)
        parts.append(part)
    return parts
