import math

import pytest
import torch

from t5vae.common.errors import UserError
from t5vae.latent.paths import grid, path


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


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_a_grid_has_its_corners_and_paths_for_sides(method):
    corners_4D = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    a_1D, b_1D, c_1D, d_1D = corners_4D.split(1)
    z_SSD = grid(corners_4D, 3, method)
    assert z_SSD.shape == (3, 3, 5)
    torch.testing.assert_close(z_SSD[[0, 0, 2, 2], [0, 2, 0, 2]], corners_4D)
    for side_SD, ends in [
        (z_SSD[0], (a_1D, b_1D)),
        (z_SSD[2], (c_1D, d_1D)),
        (z_SSD[:, 0], (a_1D, c_1D)),
        (z_SSD[:, 2], (b_1D, d_1D)),
    ]:
        torch.testing.assert_close(side_SD, path(*ends, 3, method)[0])
    if method == "linear":
        torch.testing.assert_close(z_SSD[1, 1], corners_4D.mean(0))
