import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from t5vae.evaluation.rows import Rows
from t5vae.evaluation.trigram import Trigram

CORPUS = [[5, 6, 7, 1], [5, 6, 8, 1], [5, 6, 7, 1], [9, 6, 8, 7, 1], [1]]


def test_samples_walk_only_through_seen_trigrams():
    seen = {triple for row in CORPUS for triple in zip([0, 0, *row], [0, *row], row, strict=False)}
    samples = Trigram(CORPUS).sample(500, 10, np.random.default_rng(0))
    assert len(samples) == 500
    for row in samples:
        assert row[-1] == 1
        assert 1 not in row[:-1]
        assert set(zip([0, 0, *row], [0, *row], row, strict=False)) <= seen


def test_samples_have_the_corpus_frequencies_and_its_recombinations():
    count = 40_000
    samples = Trigram(CORPUS).sample(count, 10, np.random.default_rng(0))
    shares = {row: k / count for row, k in Counter(map(tuple, samples)).items()}
    # 5 6 is followed by 7 twice of three times; 6 8 by the end once and by 7 once.
    assert shares[(5, 6, 7, 1)] == pytest.approx(3 / 5 * 2 / 3, abs=0.01)
    assert shares[(1,)] == pytest.approx(1 / 5, abs=0.01)
    assert shares[(5, 6, 8, 7, 1)] == pytest.approx(3 / 5 * 1 / 3 * 1 / 2, abs=0.01)


def test_samples_are_cut_at_max_length():
    long = [[*range(2, 50), 1]]
    assert Trigram(long).sample(2, 7, np.random.default_rng(0)) == [[2, 3, 4, 5, 6, 7, 8]] * 2


def test_probabilities_sum_to_one_and_cross_entropy_follows_the_formula():
    model = Trigram(CORPUS)
    tokens = range(model.base)
    for start in ([], [5], [5, 6], [8, 5], [77, 5]):
        rows = [[*start, token] for token in tokens]
        before = [[*start]] if start else []
        shared = model.nats_per_token(before) * len(start) if start else 0.0
        nats = [model.nats_per_token([row]) * len(row) - shared for row in rows]
        inside = [math.exp(-x) for x in nats[: model.unseen + 1]]  # unseen ones count as one
        spare = (model.base - model.unseen - 1) * inside[-1]
        assert sum(inside) + spare == pytest.approx(1)


def test_cross_entropy_by_hand():
    model = Trigram([[5, 1]])
    base = 1 / model.base
    # Each context has one follower, seen once; the unigram counts 5 and 1, one each.
    unigram = (1 + 2 * base) / 4
    p = (1 + (1 + unigram) / 2) / 2
    assert model.nats_per_token([[5, 1]]) == pytest.approx(-math.log(p))


def test_training_text_is_likelier_than_noise():
    model = Trigram(CORPUS)
    assert model.nats_per_token(CORPUS) < 1 < model.nats_per_token([[7, 9, 100, 3, 1]])


def test_counting_takes_some_tens_of_bytes_a_token():
    tokens = np.random.default_rng(0).integers(2, 30, 2**20).astype(np.uint16)
    rows = Rows(tokens, np.full(2**17, 8))
    tracemalloc.start()
    model = Trigram(rows)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * len(tokens)
    assert kept < len(tokens)
    assert model.sample(3, 5, np.random.default_rng(0))
