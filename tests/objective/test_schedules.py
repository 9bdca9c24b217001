import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5vae.objective.terms.kl import KL
from t5vae.objective.terms.mmd import MMD

STEPS = st.integers(1, 10**7)


@given(
    steps=STEPS, share=st.floats(0, 1), schedule=st.sampled_from(["constant", "linear", "sigmoid"])
)
def test_weight_stays_between_0_and_its_full_value_and_never_falls(steps, share, schedule):
    settings = MMD(weight=7.0, schedule=schedule)
    step = int(share * steps)
    now, then = (settings.weight_at(at, steps) for at in (step, step + 1))
    assert 0 <= now <= then <= 7.0


@given(steps=STEPS)
def test_constant_weight_is_the_full_weight_at_every_step(steps):
    assert MMD(weight=3.0).weight_at(steps - 1, steps) == 3.0


def test_linear_weight_rises_from_0_over_the_warm_up():
    settings = MMD(weight=8.0, schedule="linear", warmup=0.5)
    weights = [settings.weight_at(step, 8) for step in range(8)]
    assert weights == [0.0, 2.0, 4.0, 6.0, 8.0, 8.0, 8.0, 8.0]


@pytest.mark.parametrize("step", [0, 1, 2500, 4000, 100_000])
def test_sigmoid_weight_is_the_originals(step):
    settings = MMD(weight=1.0, schedule="sigmoid")
    expected = 1 / (1 + math.exp(-(0.0025 * step - 6.25)))
    assert settings.weight_at(step, 200_000) == pytest.approx(expected)


def test_sigmoid_weight_of_a_huge_offset_is_0():
    assert MMD(weight=1.0, schedule="sigmoid", offset=1000.0).weight_at(0, 10) == 0


def test_cyclical_weight_rises_anew_in_every_cycle():
    settings = KL(weight=2.0, schedule="cyclical", cycles=2, warmup=0.5)
    weights = [settings.weight_at(step, 16) for step in range(16)]
    assert weights == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0] * 2


@given(steps=STEPS, cycles=st.integers(1, 9), warmup=st.floats(0, 1))
def test_cyclical_weight_ends_at_its_full_value(steps, cycles, warmup):
    settings = KL(weight=2.0, schedule="cyclical", cycles=cycles, warmup=warmup)
    weights = [settings.weight_at(step, steps) for step in range(max(0, steps - 99), steps)]
    assert all(0 <= weight <= 2 for weight in weights)
