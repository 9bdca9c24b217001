"""What steps came to: the figures of their sums, and when they are known."""

import math

import pytest
import torch

from t5vae.config import BatchSplit
from t5vae.objective.terms.epps_pulley import EppsPulley
from t5vae.objective.terms.kl import KL
from t5vae.training import outcome
from t5vae.training.outcome import Arriving, Outcome, Outcomes

SPLIT = BatchSplit(sequences=16, ranks=2, micro=4, accumulation=2)
TERMS = {"kl": KL(weight=0.5, schedule="linear"), "epps_pulley": EppsPulley(weight=3.0)}


def make(*numbers: float, step: int = 1, norm=None, applied=True, unit=40.0) -> Outcome:
    """Of one rank, whose shares are those of all."""
    return Outcome(
        step=step,
        position=16 * (step - 1),
        applied=applied,
        about={"lr": 0.1},
        terms=TERMS,
        weights={"kl": 0.25, "epps_pulley": 3.0},
        split=SPLIT,
        tokens=40.0,
        unit=unit,
        codes=[torch.ones(4, 3), -torch.ones(4, 3)],
        names=("nll", "kl", "epps_pulley", "own"),
        shares=2,
        numbers=Arriving(torch.tensor(numbers, dtype=torch.float64)),
        norm=None if norm is None else Arriving(norm),
        sums=list(numbers[:2]),
    )


def test_figures_are_those_of_the_sums():
    figures = make(80.0, 8.0, 0.6, 0.0).figures()
    assert figures == pytest.approx(
        {
            "loss": 80 / 40 + 0.25 * 8 / 40 + 3 * 0.3,
            "reconstruction": 2.0,
            "nats_per_token": 2.0,
            "nats_per_sequence": 5.0,
            "kl": 0.5,
            "kl_weight": 0.25,
            "epps_pulley": 0.3,
            "lr": 0.1,
        }
    )


def test_a_reconstruction_that_is_summed_is_not_divided_by_tokens():
    figures = make(80.0, 8.0, 0.6, 0.0, unit=1.0).figures()
    assert figures["loss"] == pytest.approx(80 + 0.25 * 8 + 3 * 0.3)
    assert figures["nats_per_token"] == 2.0


@pytest.mark.parametrize("norm", [1.5, torch.tensor(1.5), torch.tensor([1.5])])
def test_the_norm_is_told_wherever_it_is_known_unless_the_step_was_skipped(norm):
    assert make(80.0, 8.0, 0.6, 0.0, norm=norm).figures()["grad_norm"] == 1.5
    skipped = make(80.0, 8.0, 0.6, 0.0, norm=norm, applied=False).figures()
    assert math.isnan(skipped["grad_norm"])
    assert skipped["loss"] > 0


def test_shares_are_summed_over_ranks_and_statistics_are_not():
    outcomes, outcome = Outcomes(2), make(30.0, 3.0, 0.6, 0.0)
    assert outcomes.told() == [0.0, 0.0]
    outcomes.heard([])  # there is nothing yet
    assert list(outcomes.after(outcome, wait=False)) == []
    assert outcomes.told() == [30.0, 3.0]
    outcomes.heard([80.0, 8.0])
    figures = outcome.figures()
    assert (figures["reconstruction"], figures["kl"], figures["epps_pulley"]) == (2.0, 0.5, 0.3)


@pytest.mark.parametrize("place", range(3))
def test_where_a_loss_is_not_finite_no_figure_of_it_is(place):
    numbers = [80.0, 8.0, 0.6, 0.0]
    numbers[place] = math.inf
    figures = make(*numbers, applied=False).figures()
    assert {name for name, x in figures.items() if math.isfinite(x)} == {"kl_weight", "lr"}


@pytest.mark.parametrize(
    ("own", "blamed"), [([0.0, math.nan], [1]), ([math.nan] * 2, [0, 1]), ([0.0, 0.0], [0, 1])]
)
def test_the_ranks_whose_own_share_is_not_finite_are_blamed_or_all(monkeypatch, own, blamed):
    monkeypatch.setattr(outcome, "gather_objects", lambda _: [math.isfinite(x) for x in own])
    assert make(math.nan, 8.0, 0.6, own[0]).nonfinite_ranks() == blamed


def test_where_all_is_finite_nobody_is_asked():
    assert make(80.0, 8.0, 0.6, 0.0).nonfinite_ranks() == []


def test_codes_are_compared_with_the_prior():
    found = make(80.0, 8.0, 0.6, 0.0).latent_diagnostics()
    assert found == pytest.approx(
        {"latent_variance": 8 / 7, "latent_square": 1.0, "latent_saturated": 1.0}
    )


def test_outcomes_come_a_step_late_and_in_order_and_at_once_when_waited_for(monkeypatch):
    monkeypatch.setattr(outcome, "all_sum", lambda *own: list(own))
    outcomes, known = Outcomes(2), []
    for step in range(1, 8):
        one = make(80.0, 8.0, 0.6, 0.0, step=step)
        known.append([past.step for past in outcomes.after(one, wait=step in (4, 5, 7))])
    assert known == [[], [1], [2], [3, 4], [5], [], [6, 7]]
