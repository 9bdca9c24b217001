"""The control: what a token trigram model, which knows nothing but three tokens, would score.

Most of a trigram model's short Python lines parse, so a validity without this one beside it means
nothing.
"""

import numpy as np
from numpy.typing import NDArray

from t5vae.evaluation.rows import Ids, Rows

START = -1  # what stands before a sequence
ORDERS = TRIGRAM, BIGRAM, UNIGRAM = 0, 1, 2


class Trigram:
    """A trigram model of token sequences, counted from a training set.

    Counts are three sorted arrays of (context, token) keys, each key once, and how often those
    before it occur: a count is the length of a span between two binary searches, and a draw from a
    context's followers is a random occurrence in its span. Counting takes about 40 bytes a token.

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
            _Order(self._context(order, before, before2), tokens, self.base) for order in ORDERS
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
            trigrams = self.orders[TRIGRAM]
            start, end = trigrams.span(self._context(TRIGRAM, before, before2))
            pick = start + (rng.random(n) * (end - start)).astype(np.int64)
            token = np.where(alive, trigrams.token(pick), self.eos)
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
        for order in ORDERS[::-1]:
            p = self.orders[order].mix(self._context(order, before, before2), tokens, p)
        return float(-np.log(p).mean())

    def _context(self, order: int, before: NDArray, before2: NDArray) -> NDArray:
        """int64, of as many tokens as an order knows."""
        digits = (before2, before)[order:]
        context = np.zeros(len(before), np.int64)
        for digit in digits:
            context *= self.base
            context += np.minimum(digit, self.unseen) % self.base
        return context


class _Order:
    """Counts of (context, token).

    Attributes:
        keys: int64, each once, ascending.
        before: int64 [keys + 1], occurrences of all keys before each, and in all.
    """

    def __init__(self, context: NDArray, tokens: NDArray, base: int):
        self.base = base
        keys = context * base
        keys += tokens
        keys.sort()
        first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        self.keys, self.before = keys[first], np.append(first, len(keys))

    def span(self, context: NDArray) -> tuple[NDArray, NDArray]:
        """Of occurrences."""
        start, end = self._followers(context)
        return self.before[start], self.before[end]

    def token(self, occurrence: NDArray) -> NDArray:
        """Of occurrences, counted through the keys."""
        place = np.searchsorted(self.before, occurrence % self.before[-1], side="right") - 1
        return self.keys[place] % self.base

    def mix(self, context: NDArray, tokens: NDArray, lower: NDArray) -> NDArray:
        first, last = self._followers(context)
        start, end = self.before[first], self.before[last]
        followers = last - first
        key = context * self.base + tokens
        count = (
            self.before[np.searchsorted(self.keys, key, "right")]
            - self.before[np.searchsorted(self.keys, key)]
        )
        seen = end > start
        total = np.where(seen, end - start + followers, 1)
        return np.where(seen, (count + followers * lower) / total, lower)

    def _followers(self, context: NDArray) -> tuple[NDArray, NDArray]:
        """Where a context's keys begin and end."""
        first = context * self.base
        return np.searchsorted(self.keys, first), np.searchsorted(self.keys, first + self.base)


def _columns(ids: Ids) -> tuple[NDArray, NDArray, NDArray]:
    """All tokens in a row, int32, and beside each the token before it and the one before that."""
    rows = Rows.of(ids)
    tokens = rows.tokens.astype(np.int32)
    starts = (rows.ends - rows.lengths)[rows.lengths > 0]
    before = np.roll(tokens, 1)
    before[starts] = START
    before2 = np.roll(before, 1)
    before2[starts] = START
    return tokens, before, before2
