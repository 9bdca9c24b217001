"""Token sequences in one array."""

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

Ids = Sequence[Sequence[int]]


class Rows(Sequence[list[int]]):
    """Sequences one after the other; to index them is to copy.

    Args:
        tokens: int [sum of lengths], of any width.
        lengths: int [rows].
    """

    def __init__(self, tokens: np.ndarray, lengths: np.ndarray):
        self.tokens, self.lengths = tokens, lengths.astype(np.int64)
        self.ends = self.lengths.cumsum()

    @classmethod
    def of(cls, ids: Ids) -> "Rows":
        """Sequences as such, int32; themselves if they are."""
        if isinstance(ids, Rows):
            return ids
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        tokens = (token for row in ids for token in row)
        return cls(np.fromiter(tokens, np.int32, int(lengths.sum())), lengths)

    @classmethod
    def joined(cls, blocks: Iterator[tuple[np.ndarray, np.ndarray]]) -> "Rows":
        """The sequences of blocks: of each, lengths and tokens."""
        lengths, tokens = zip(*blocks, strict=True)
        return cls(np.concatenate(tokens), np.concatenate(lengths))

    @property
    def longest(self) -> int:
        return int(self.lengths.max(initial=0))

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, row: int) -> list[int]: ...
    @overload
    def __getitem__(self, row: slice) -> list[list[int]]: ...
    def __getitem__(self, row: int | slice) -> list[int] | list[list[int]]:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        end = self.ends[row]
        return self.tokens[end - self.lengths[row] : end].tolist()
