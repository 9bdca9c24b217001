"""The control: what a token trigram model, which knows nothing but three tokens, would score.

Most of a trigram model's short Python lines parse, so a validity without this one beside it means
nothing.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ids = Sequence[Sequence[int]]
START = -1  # what stands before a sequence


class Trigram:
    """A trigram model of token sequences, counted from a training set.

    Counts are three sorted arrays of (context, token) keys: a count is the length of a span
    between two binary searches, and a draw from a context's followers is a random entry of its
    span.

    Args:
        ids: token ids of the training sequences, each ending in `eos`.
        eos: the end token.
    """

    def __init__(self, ids: Ids, eos: int = 1):
        tokens, before, before2 = _columns(ids)
        self.eos = eos
        self.unseen = int(tokens.max()) + 1  # any token past the training set's
        self.base = self.unseen + 2  # and START, -1, becomes the last digit
        self.orders = [
            _Order(context, tokens, self.base) for context in self._contexts(before, before2)
        ]

    def sample(self, n: int, max_length: int, rng: np.random.Generator) -> list[list[int]]:
        """n sequences at once, from the unsmoothed model: it walks through seen contexts alone,
        so more of its samples are valid than of a smoothed one's: the stronger control.

        Args:
            n: how many.
            max_length: tokens at most, end token included.
            rng: the source of randomness.

        Returns:
            n lists of token ids, each ending in the end token unless cut at `max_length`.
        """
        drawn_NT = np.full((n, max_length), self.eos)
        before = before2 = np.full(n, START)
        alive = np.ones(n, dtype=bool)
        for step in range(max_length):
            trigrams = self.orders[0]
            start, end = trigrams.span(self._contexts(before, before2)[0])
            pick = start + (rng.random(n) * (end - start)).astype(np.int64)
            token = np.where(alive, trigrams.keys[pick % len(trigrams.keys)] % self.base, self.eos)
            drawn_NT[:, step] = token
            before, before2 = token, before
            alive &= token != self.eos
        lengths = np.minimum((drawn_NT != self.eos).sum(1) + 1, max_length)
        return [row[:length].tolist() for row, length in zip(drawn_NT, lengths, strict=True)]

    def nats_per_token(self, ids: Ids) -> float:
        """Cross-entropy of held-out sequences, end tokens included, interpolated with the bigram,
        unigram and uniform models by Witten and Bell's weights (Chen and Goodman, 1998):
        p(w | h) = (c(h w) + t(h) p(w | h')) / (c(h) + t(h)), t(h) the distinct followers of h.
        """
        tokens, before, before2 = _columns(ids)
        tokens = np.minimum(tokens, self.unseen)
        p = np.full(len(tokens), 1 / self.base)
        for order, context in zip(
            self.orders[::-1], self._contexts(before, before2)[::-1], strict=True
        ):
            p = order.mix(context, tokens, p)
        return float(-np.log(p).mean())

    def _contexts(self, before: NDArray, before2: NDArray) -> list[NDArray]:
        """Of the trigram, the bigram and the unigram."""
        first, second = (np.minimum(x, self.unseen) % self.base for x in (before2, before))
        return [first * self.base + second, second, np.zeros_like(second)]


class _Order:
    """Counts of (context, token)."""

    def __init__(self, context: NDArray, tokens: NDArray, base: int):
        self.base = base
        self.keys = np.sort(context * base + tokens)
        self.distinct = np.concatenate([[0], np.cumsum(np.diff(self.keys, prepend=-1) != 0)])

    def span(self, context: NDArray) -> tuple[NDArray, NDArray]:
        first = context * self.base
        return np.searchsorted(self.keys, first), np.searchsorted(self.keys, first + self.base)

    def mix(self, context: NDArray, tokens: NDArray, lower: NDArray) -> NDArray:
        start, end = self.span(context)
        followers = self.distinct[end] - self.distinct[start]
        key = context * self.base + tokens
        count = np.searchsorted(self.keys, key, "right") - np.searchsorted(self.keys, key)
        seen = end > start
        total = np.where(seen, end - start + followers, 1)
        return np.where(seen, (count + followers * lower) / total, lower)


def _columns(ids: Ids) -> tuple[NDArray, NDArray, NDArray]:
    """All tokens in a row, int64, and beside each the token before it and the one before that."""
    tokens = np.concatenate([np.asarray(row, dtype=np.int64) for row in ids])
    lengths = np.array([len(row) for row in ids])
    starts = (np.cumsum(lengths) - lengths)[lengths > 0]
    before = np.roll(tokens, 1)
    before[starts] = START
    before2 = np.roll(before, 1)
    before2[starts] = START
    return tokens, before, before2
