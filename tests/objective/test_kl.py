"""KL against torch's own, in fp64."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from t5vae.objective import Codes
from t5vae.objective.terms.kl import KL


def codes(rows: int = 5, scale: float = 1.0, weights_B: Tensor | None = None) -> Codes:
    mean_BD, log_variance_BD = torch.randn(2, rows, 3, dtype=torch.float64).requires_grad_()
    if weights_B is None:
        weights_B = torch.ones(rows, dtype=torch.float64)
    return Codes(
        mean_BD, weights_B, scale, 0, rows, mean_BD=mean_BD, log_variance_BD=log_variance_BD
    )


def each_divergence(codes: Codes) -> Tensor:
    posterior = Normal(codes.mean_BD, (codes.log_variance_BD / 2).exp())
    return kl_divergence(posterior, Normal(0.0, codes.scale))


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_it_is_the_divergence_from_the_prior_of_any_scale(scale):
    given = codes(scale=scale)
    (kl,) = KL(weight=1.0).values(given)
    expected = each_divergence(given).sum()
    torch.testing.assert_close(kl, expected)
    for found, wanted in zip(
        torch.autograd.grad(kl, (given.mean_BD, given.log_variance_BD)),
        torch.autograd.grad(expected, (given.mean_BD, given.log_variance_BD)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def test_rows_that_do_not_count_add_nothing():
    weights_B = torch.tensor([1.0, 0, 0, 1, 0], dtype=torch.float64)
    given = codes(weights_B=weights_B)
    (kl,) = KL(weight=1.0).values(given)
    torch.testing.assert_close(kl, each_divergence(given)[[0, 3]].sum())


def test_free_bits_of_a_coordinate_cost_the_same_and_pull_nothing():
    given, term = codes(rows=50), KL(weight=1.0, free_bits=0.3)
    floored, kl = term.values(given)
    assert term.logs == ("kl_floored", "kl")
    each_BD = each_divergence(given)
    torch.testing.assert_close(kl, each_BD.sum())
    torch.testing.assert_close(floored, each_BD.clamp(min=0.3).sum())
    gradient_BD, _ = torch.autograd.grad(floored, (given.mean_BD, given.log_variance_BD))
    assert torch.equal(gradient_BD == 0, each_BD < 0.3)
    assert 0 < (each_BD < 0.3).sum() < each_BD.numel()


def test_where_in_memory_the_weights_lie_changes_no_bit():
    generator = torch.Generator().manual_seed(0)
    mean_BD, log_variance_BD = torch.randn(2, 7, 3, generator=generator)
    found = {
        tuple(value.item() for value in KL(free_bits=0.1).values(codes_of))
        for start in range(16)
        for weights_B in [torch.ones(32)[start : start + 7]]
        for codes_of in [
            Codes(mean_BD, weights_B, 1.0, 0, 7, mean_BD=mean_BD, log_variance_BD=log_variance_BD)
        ]
    }
    assert len(found) == 1
