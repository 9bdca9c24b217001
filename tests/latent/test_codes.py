import math

import pytest
import torch

from shards.errors import UserError
from t5vae.latent.codes import Gaussian, Normal, path


def test_linear_path_is_even_and_its_ends_are_exact():
    a_ND, b_ND = torch.randn(3, 5), torch.randn(3, 5)
    z_NSD = path(a_ND, b_ND, 11)
    assert torch.equal(z_NSD[:, 0], a_ND)
    assert torch.equal(z_NSD[:, -1], b_ND)
    torch.testing.assert_close(z_NSD.diff(dim=1), (b_ND - a_ND)[:, None].expand(3, 10, 5) / 10)


def test_slerp_turns_at_an_even_pace_and_keeps_the_norm():
    a_ND, b_ND = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    z_SD = path(a_ND, b_ND, 4, "slerp")[0]
    angles = [math.radians(30 * i) for i in range(4)]
    expected = torch.tensor([[2 * math.cos(x), 2 * math.sin(x)] for x in angles])
    torch.testing.assert_close(z_SD, expected)


def test_slerp_between_parallel_opposite_or_zero_codes_is_the_straight_line():
    a_ND = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]])
    b_ND = torch.tensor([[2.0, 4.0], [-1.0, -2.0], [0.0, 0.0]])
    torch.testing.assert_close(path(a_ND, b_ND, 5, "slerp"), path(a_ND, b_ND, 5))


@pytest.mark.parametrize(("steps", "method"), [(1, "linear"), (11, "cubic")])
def test_a_wrong_path_is_refused(steps, method):
    with pytest.raises(UserError):
        path(torch.zeros(1, 2), torch.ones(1, 2), steps, method)


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
