"""Datasets to train on: one folder of shards, or several mixed by weight."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.format.index import Index, open_index
from shards.storage.cache import Cache
from t5vae.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CYCLE = 10_000  # the longest cycle of a mixture; rarer sources get one place in it

Location = str | Path
Sources = Location | Sequence[Location | Mapping[str, Any]]


class Mixing:
    """Which source each position of a mixture takes: a fixed cycle, each source spread evenly.

    Args:
        quotas: how often each source occurs in one cycle.
    """

    def __init__(self, quotas: Sequence[int]):
        self.quotas = tuple(quotas)
        source = np.repeat(np.arange(len(quotas)), quotas)
        when = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in quotas])
        self._cycle = source[np.argsort(when, kind="stable")]
        taken = np.cumsum(self._cycle[:, None] == np.arange(len(quotas)), axis=0)
        self._before = np.vstack([np.zeros(len(quotas), np.int64), taken])

    def taken(self, positions: np.ndarray) -> np.ndarray:
        """How many sequences of each source lie before each position, int64 [n, sources]."""
        cycles, rest = np.divmod(np.asarray(positions, np.int64), len(self._cycle))
        return cycles[:, None] * np.array(self.quotas) + self._before[rest]


@dataclass(frozen=True)
class Dataset:
    """One or several dataset folders, all with the same tokenizer, as one.

    Attributes:
        indexes: of the folders.
        quotas: sequences of each in one cycle of the mixture.
    """

    indexes: tuple[Index, ...]
    quotas: tuple[int, ...]

    @property
    def path(self) -> str:
        """The folders, for people."""
        return " + ".join(index.path for index in self.indexes)

    @property
    def sha256(self) -> str:
        """Of the index; of a mixture, of all its indexes and quotas."""
        if len(self.indexes) == 1:
            return self.indexes[0].sha256
        parts = [f"{i.sha256}:{q}" for i, q in zip(self.indexes, self.quotas, strict=True)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @property
    def max_length(self) -> int:
        """The most tokens a sequence may have, its end token counted."""
        return max(index.max_length for index in self.indexes)

    @property
    def vocab_size(self) -> int:
        return self.indexes[0].vocab_size

    @property
    def pad_id(self) -> int:
        return self.indexes[0].pad_id

    @property
    def eos_id(self) -> int:
        return self.indexes[0].eos_id

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.indexes[0].tokenizer_fingerprint

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer."""
        return self.indexes[0].tokenizer()

    def sequences(self, split: str) -> int:
        """How many sequences a split holds in all."""
        return sum(index.sequences(split) for index in self.indexes)

    def first(self, split: str, count: int) -> np.ndarray:
        """The numbers of some sequences of a split, each source's share of them by its quota.

        Returns:
            int64 [count], fewer where a source has too few; numbers go through the sources.
        """
        sizes = np.array([index.sequences(split) for index in self.indexes])
        shares = np.minimum(Mixing(self.quotas).taken(np.array([count]))[0], sizes)
        begins = np.cumsum(sizes) - sizes
        return np.concatenate([b + np.arange(n) for b, n in zip(begins, shares, strict=True)])

    def read(self, split: str, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sequences by number, counted through the sources; see `Index.read`."""
        numbers = np.asarray(numbers, np.int64)
        ids = np.full((len(numbers), self.max_length), self.pad_id, np.int64)
        lengths = np.zeros(len(numbers), np.int64)
        begin = 0
        for index in self.indexes:
            size = index.sequences(split)
            mine = np.flatnonzero((begin <= numbers) & (numbers < begin + size))
            its_ids, lengths[mine] = index.read(split, numbers[mine] - begin)
            ids[mine, : its_ids.shape[1]] = its_ids
            begin += size
        return ids[:, : lengths.max(initial=0)], lengths

    def block_table(self, split: str) -> np.ndarray:
        """BLOCK [blocks of the split], through the sources."""
        return np.concatenate([index.split_blocks(split) for index in self.indexes])

    def blocks(
        self, split: str, numbers: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Read blocks one after the other.

        Args:
            split: the split's name.
            numbers: int [n], ascending, places in `block_table`; all of them by default.

        Yields:
            lengths uint16 [rows] and tokens uint16 or uint32 [their sum], not to be written to.

        Raises:
            DamageError, StorageError, UserError: as `Index.read` does.
        """
        begin = 0
        for index in self.indexes:
            reader = index.reader(split)
            end = begin + len(reader.table)
            chosen = np.arange(begin, end) if numbers is None else numbers
            for number in chosen[(begin <= chosen) & (chosen < end)].tolist():
                yield reader.read(number - begin)
            begin = end

    def texts(self, split: str, numbers: np.ndarray) -> list[str]:
        """The same sequences, decoded."""
        ids, _ = self.read(split, numbers)
        return self.tokenizer().batch_decode(ids, skip_special_tokens=True)


def open_dataset(sources: Sources, cache: Cache | None = None) -> Dataset:
    """Open one dataset folder, or a mixture of several.

    Args:
        sources: a folder or URL, or a list of them, or of mappings with "path" and "weight": the
            share of a source among the sequences, relative to the others' (1 where none is given).
        cache: where copies of remote shards are kept; by default `Cache()`.

    Raises:
        UserError: no such dataset, one named twice, weights that are not positive, or tokenizers
            that differ.
    """
    if isinstance(sources, str | Path):
        return Dataset((open_index(sources, cache),), (1,))
    entries: list[Mapping[str, Any]] = [
        source if isinstance(source, Mapping) else {"path": source} for source in sources
    ]
    if not entries:
        raise UserError("a mixture of no datasets: name at least one")
    indexes = tuple(open_index(entry["path"], cache) for entry in entries)
    for number, index in enumerate(indexes[1:], 1):
        if index.path in (other.path for other in indexes[:number]):
            raise UserError(f"a mixture names {index.path} twice: give it one larger weight")
        if index.tokenizer_fingerprint != indexes[0].tokenizer_fingerprint:
            raise UserError(
                f"{indexes[0].path} and {index.path} have different tokenizers: build one with "
                f"--tokenizer {indexes[0].path}/tokenizer"
            )
    return Dataset(indexes, _quotas([entry.get("weight", 1) for entry in entries]))


def _quotas(weights: list[float]) -> tuple[int, ...]:
    """Integers in the proportion of the weights: exact where a cycle is not too long for that."""
    if not all(weight > 0 for weight in weights):
        raise UserError(f"weights {weights} of a mixture: each must be above 0")
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    if sum(whole) <= CYCLE:
        return tuple(whole)
    return tuple(max(1, round(CYCLE * weight / sum(exact))) for weight in exact)
