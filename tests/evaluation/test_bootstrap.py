import json

import numpy as np
import pytest
import torch

from t5vae.evaluation.bootstrap import Ratio, half_sampled, intervals
from t5vae.evaluation.geometry import geometry


def rng(seed=0):
    return np.random.default_rng(seed)


def test_a_ratio_is_a_float_that_knows_its_items():
    ratio = Ratio([1, 0, 3], [1, 2, 5])
    assert ratio == 0.5
    assert json.dumps(ratio) == "0.5"
    assert Ratio([True, False]) == 0.5
    assert Ratio([0, 0], [0, 0]) == 0
    assert Ratio([]) == 0


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation():
    items = rng().normal(3, 2, size=2000)
    low, high = Ratio(items).interval(rng())
    error = 1.96 * items.std() / np.sqrt(2000)
    assert low == pytest.approx(items.mean() - error, abs=0.15 * error)
    assert high == pytest.approx(items.mean() + error, abs=0.15 * error)


def test_intervals_hold_the_truth_as_often_as_they_say():
    held = 0
    for seed in range(100):
        low, high = Ratio(rng(seed).random(200) < 0.3).interval(rng(seed + 1000))
        held += low <= 0.3 <= high
    assert 88 <= held <= 100


def test_a_ratio_of_sums_counts_its_items_together():
    """Items of 9 tokens all right and of 1 token all wrong: drawn with their tokens."""
    right = rng().random(400) < 0.5
    tokens = np.where(right, 9, 1)
    low, high = Ratio(tokens * right, tokens).interval(rng())
    assert low < 0.9 < high
    assert high - low < 0.1


def test_intervals_stand_under_the_names_of_their_figures():
    report = {
        "a": Ratio([1, 0] * 50),
        "b": 3.0,
        "c": None,
        "d": {"e": Ratio([1, 1]), "f": {"g": 1}},
    }
    found = intervals(report, rng())
    assert found.keys() == {"a", "d"}
    assert found["d"] == {"e": [1, 1]}
    assert found["a"][0] < 0.5 < found["a"][1]


def test_half_samples_spread_like_new_samples():
    """Beside the spread of 60 new clouds of as many codes."""
    draws = [torch.randn(200, 5, generator=torch.Generator().manual_seed(s)) for s in range(60)]
    true = [np.std([geometry(z)[name] for z in draws]) for name in ("mmd", "mean_square_norm")]
    found = half_sampled(geometry, draws[0], rng())
    for spread, name in zip(true, ("mmd", "mean_square_norm"), strict=True):
        low, high = found[name]
        assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.5)
    assert found.keys() == geometry(draws[0]).keys()
