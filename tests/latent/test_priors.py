import pytest
import torch

from shards.errors import UserError
from t5vae.latent.priors import Gaussian, Normal


def test_gaussian_draws_have_the_mean_and_covariance_of_the_codes():
    generator = torch.Generator().manual_seed(0)
    mix_DD = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.5, 0.0], [0.0, 0.0, 0.0]])  # the third is dead
    codes_ND = torch.randn(500, 3, generator=generator) @ mix_DD.T + 3
    drawn_ND = Gaussian(codes_ND).draw(200_000, generator)
    assert drawn_ND.dtype == torch.float32
    torch.testing.assert_close(drawn_ND.mean(0), codes_ND.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(drawn_ND.T.cov(), codes_ND.T.cov(), atol=0.05, rtol=0)


@pytest.mark.parametrize("n", [2, 3])
def test_gaussian_needs_fewer_codes_than_dimensions(n):
    drawn_ND = Gaussian(torch.randn(n, 8)).draw(4, torch.Generator())
    assert drawn_ND.shape == (4, 8)
    assert drawn_ND.isfinite().all()


def test_gaussian_of_one_dimension_and_of_one_code():
    assert Gaussian(torch.randn(9, 1)).draw(2, torch.Generator()).shape == (2, 1)
    with pytest.raises(UserError, match="at least 2"):
        Gaussian(torch.zeros(1, 4))


def test_the_same_seed_draws_the_same_codes():
    one, two = (Normal(4).draw(3, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two)
