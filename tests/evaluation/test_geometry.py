import math

import pytest
import torch

from t5vae.evaluation import geometry as module
from t5vae.evaluation.geometry import FIGURES, geometry


def draws(rows=50):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))


def test_figures_of_draws_of_the_prior_are_numbers():
    found = geometry(draws())
    assert found.keys() == FIGURES.keys()
    assert all(map(math.isfinite, found.values()))
    assert found["active_dimensions"] == 8


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [[0], [3, 49], list(range(50))])
def test_codes_that_are_not_finite_have_no_figures(value, rows):
    z_ND = draws()
    z_ND[rows, 2] = value
    found = geometry(z_ND)
    assert found.keys() == FIGURES.keys()
    assert all(map(math.isnan, found.values()))


@pytest.mark.parametrize("scale", [1e19, 1e30, 3e38])
def test_codes_that_are_huge_fail_nowhere(scale):
    assert geometry(draws() * scale).keys() == FIGURES.keys()


@pytest.mark.parametrize(
    "error", [torch.linalg.LinAlgError("no"), ValueError("no"), OverflowError("no")]
)
def test_a_figure_that_fails_is_no_number_and_costs_no_other(monkeypatch, error):
    def fail(z_ND):
        raise error

    monkeypatch.setitem(module.FIGURES, "participation_ratio", fail)
    found = geometry(draws())
    assert [name for name, value in found.items() if math.isnan(value)] == ["participation_ratio"]


def test_one_code_alone_has_no_mmd():
    found = geometry(draws(1))
    assert math.isnan(found["mmd"])
    assert found["mean_square_norm"] > 0
