"""The training set, as far as an evaluation asks about it, read block by block."""

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from shards import Dataset
from t5vae.common.progress import stage
from t5vae.evaluation.rows import Ids, Rows
from t5vae.evaluation.spelling import Hashes, views

MOST, MOST_TOKENS = 1_000_000, 2**24  # sequences of a sample, and their tokens
SPLIT = "train"
NEAR_BITS = 20
SHIFT = np.uint64(64 - NEAR_BITS)

Block = tuple[np.ndarray, np.ndarray]  # lengths [rows], tokens [their sum]


class Found(NamedTuple):
    """What of that which was looked for is in the training set."""

    texts: Collection[str]
    ids: Collection[tuple[int, ...]]


class TrainingSet(Protocol):
    """The sequences that a model was trained on."""

    @property
    def count(self) -> int:
        """How many there are."""

    def sample(self) -> Rows:
        """Some, always the same; all, where there are not too many."""

    def find(self, texts: Sequence[str], ids: Ids) -> Found:
        """Which texts are training texts, and which sequences training sequences."""


class GivenTraining:
    """A training set in memory.

    Args:
        ids: token ids of its sequences.
        texts: the sequences, decoded.
    """

    def __init__(self, ids: Ids, texts: Sequence[str]):
        self.ids, self.texts = ids, texts

    @property
    def count(self) -> int:
        return len(self.ids)

    def sample(self) -> Rows:
        return Rows.of(self.ids)

    def find(self, texts: Sequence[str], ids: Ids) -> Found:
        return Found(
            set(self.texts).intersection(texts),
            set(map(tuple, self.ids)).intersection(map(tuple, ids)),
        )


class Training:
    """The split train of a dataset, of which a block at a time is in memory.

    Args:
        dataset: of one or several sources.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    @property
    def count(self) -> int:
        return self.dataset.sequences(SPLIT)

    def sample(self) -> Rows:
        """All sequences; where they or their tokens are more than MOST and MOST_TOKENS, those of
        some blocks, evenly spread, about as many. The build has shuffled them.

        Raises:
            DamageError, StorageError, UserError: as `Index.read` does.
        """
        blocks = self.dataset.block_table(SPLIT)
        tokens = int(blocks["tokens"].sum(dtype=np.int64))
        share = min(MOST / self.count, MOST_TOKENS / tokens, 1)
        chosen = max(1, int(share * len(blocks)))
        return Rows.joined(
            self.dataset.blocks(SPLIT, np.arange(chosen) * len(blocks) // chosen),
        )

    def known(self, texts: Sequence[str]) -> Collection[str]:
        """Those of the texts that a training sequence decodes to; see `find`."""
        return self.find(texts, []).texts

    def find(self, texts: Sequence[str], ids: Ids) -> Found:
        """Look for texts and sequences in one pass over the split.

        Args:
            texts: as training sequences would decode, special tokens left out, spaces untouched.
            ids: sequences with their end tokens.

        Raises:
            DamageError, StorageError, UserError: as `Index.read` does.
        """
        tokenizer = self.dataset.tokenizer()
        of_texts = list(_searches(tokenizer, texts))
        numbers = [number.to_bytes(4, "little") for number in range(len(tokenizer))]
        of_ids = _Search(
            {tuple(row): np.array(row, "<u4").tobytes() for row in ids}, Hashes(numbers), _as_tuples
        )
        with stage("looked for texts in the training set", self.count) as advance:
            for lengths, tokens in self.dataset.blocks(SPLIT):
                for search in (of_ids, *of_texts):
                    search.look(lengths, tokens)
                advance(len(lengths))
        return Found(set().union(*(search.found for search in of_texts)), of_ids.found)


class _Search:
    """Looks for some things among the sequences of blocks.

    Args:
        content: of each thing, the bytes that tokens of a sequence that it is make up.
        hashes: of those bytes; None to take every sequence for what it may be.
        things: what sequences are.
        among: whether it may be in a block of these tokens.
    """

    def __init__(
        self,
        content: dict[Any, bytes],
        hashes: Hashes | None,
        things: Callable[[list[list[int]]], Sequence[Hashable]],
        among: Callable[[np.ndarray], bool] = lambda tokens: True,
    ):
        self.hashes, self.things, self.among = hashes, things, among
        self.left = dict.fromkeys(content, 0)
        self.found: set[Any] = set()
        if hashes and content:
            of_content = hashes.contents(list(content.values()))
            self.wanted, which, self.sharing = np.unique(
                of_content, return_inverse=True, return_counts=True
            )
            self.left = dict(zip(content, which.tolist(), strict=True))
            self.near = np.zeros(2**NEAR_BITS, bool)  # by their first bits: most rows end here
            self.near[self.wanted >> SHIFT] = True

    def look(self, lengths: np.ndarray, tokens: np.ndarray) -> None:
        """Find what is among the sequences of a block."""
        if not self.left or not self.among(tokens):
            return
        rows, ends = self._alike(lengths, tokens), np.cumsum(lengths, dtype=np.int64)
        ids = [tokens[ends[row] - lengths[row] : ends[row]].tolist() for row in rows]
        for thing in self.left.keys() & set(self.things(ids)):
            place = self.left.pop(thing)
            self.found.add(thing)
            if self.hashes:
                self.sharing[place] -= 1

    def _alike(self, lengths: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The rows that may be what is left to find."""
        if self.hashes is None:
            return np.arange(len(lengths))
        of_rows = self.hashes.rows(tokens, lengths)
        rows = np.flatnonzero(self.near[of_rows >> SHIFT])
        of_rows = of_rows[rows]
        place = np.minimum(np.searchsorted(self.wanted, of_rows), len(self.wanted) - 1)
        return rows[(self.wanted[place] == of_rows) & (self.sharing[place] > 0)]


def _searches(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[_Search]:
    def decoded(ids: list[list[int]]) -> list[str]:
        if tokenizer.is_fast:  # in all of the machine's cores
            return tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=True)
        if not ids:
            return []
        return tokenizer.batch_decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    ways = views(tokenizer)
    if ways is None:
        yield _Search(dict.fromkeys(texts, b""), None, decoded)
        return
    for view in ways:
        contents = {text: view.shown(text.encode()) for text in texts if view.of(text)}
        if contents:
            yield _Search(contents, Hashes(view.pieces), decoded, view.among)


def _as_tuples(ids: list[list[int]]) -> list[tuple[int, ...]]:
    return list(map(tuple, ids))
