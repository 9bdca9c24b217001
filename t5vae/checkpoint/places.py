"""Where ranks hold the elements of a parameter: three numbers, however many the ranks are.

DeepSpeed lays parameters one after the other and deals them out in pieces of one size (ZeRO 1 and
2), or does so with each by itself (ZeRO 3); without ZeRO, checkpoints do.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
"""What safetensors call a dtype."""
DTYPES = {name: dtype for dtype, name in NAMES.items()}


class Place(NamedTuple):
    """A flattened parameter in a row of pieces, of which each rank holds one.

    Attributes:
        offset: of its first element in the row.
        elements: of it.
        size: of a piece, in elements.
    """

    offset: int
    elements: int
    size: int

    def part(self, rank: int) -> tuple[int, int]:
        """The first of its elements that a rank holds, and how many."""
        begin = rank * self.size - self.offset
        start = min(max(begin, 0), self.elements)
        return start, min(max(begin + self.size, 0), self.elements) - start

    def ranks(self, start: int, length: int) -> range:
        """Those that hold a range of its elements, as far as there are any."""
        stop = min(start + length, self.elements)
        if start >= stop:
            return range(0)
        return range((self.offset + start) // self.size, (self.offset + stop - 1) // self.size + 1)


class Placed(NamedTuple):
    """Where a parameter is, or a moment of it, and its dtype."""

    place: Place
    dtype: torch.dtype


Places = dict[tuple[str, str], Placed]
"""By kind and parameter."""


def grouped(found: Iterable[tuple[Mapping[str, torch.dtype], Mapping[str, Place]]]) -> list[Any]:
    """What a manifest says of places, which `places_of` reads.

    Args:
        found: kinds with their dtypes, and the parameters that have all of these.
    """
    groups: dict[tuple[tuple[str, str], ...], dict[str, list[int]]] = {}
    for kinds, places in found:
        named = tuple(sorted((kind, NAMES[dtype]) for kind, dtype in kinds.items()))
        groups.setdefault(named, {}).update({name: [*place] for name, place in places.items()})
    return [{"kinds": dict(kinds), "parameters": of} for kinds, of in groups.items()]


def places_of(groups: Iterable[Any]) -> Places:
    """The places in a manifest.

    Raises:
        ValueError: one is there twice.
    """
    places: Places = {}
    for group in groups:
        for kind, dtype in group["kinds"].items():
            for name, numbers in group["parameters"].items():
                if (kind, name) in places:
                    raise ValueError(f"{kind} of {name} is there twice")
                places[kind, name] = Placed(Place(*numbers), DTYPES[dtype])
    return places
