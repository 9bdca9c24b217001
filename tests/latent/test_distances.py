import math

import pytest
import torch

from t5vae.latent import distances
from t5vae.latent.distances import distance, nearest, originals


def codes(n: int, d: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[2**24, 64], ids=["one block", "blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", request.param)
    monkeypatch.setattr(distances, "ROWS", min(request.param, 16))


def test_a_distance_is_the_root_mean_square_over_coordinates():
    assert distance(torch.zeros(1, 16), torch.full((1, 16), 3.0)).item() == 3
    far_N = distance(codes(4000, 64), codes(4000, 64, seed=1))
    assert far_N.mean().item() == pytest.approx(math.sqrt(2), abs=0.02)


def test_the_nearest_are_those_of_the_whole_matrix(blocks):
    queries_QD, codes_ND = codes(7), codes(200, seed=1)
    found_QK, rows_QK = nearest(queries_QD, codes_ND, 5)
    all_QN = torch.cdist(queries_QD, codes_ND) / 2
    expected = all_QN.topk(5, largest=False)
    torch.testing.assert_close(found_QK, expected.values)
    assert torch.equal(rows_QK, expected.indices)


def test_equal_codes_are_found_once_each(blocks):
    codes_ND = codes(1).repeat(100, 1)
    found_QK, rows_QK = nearest(codes_ND[:2], codes_ND, 100)
    assert rows_QK.sort(dim=1).values.tolist() == [list(range(100))] * 2
    assert found_QK.tolist() == [[0] * 100] * 2


def test_there_are_no_more_neighbours_than_codes(blocks):
    found_QK, rows_QK = nearest(codes(3), codes(2, seed=1), 9)
    assert found_QK.shape == rows_QK.shape == (3, 2)
    assert nearest(codes(0), codes(5), 2)[0].shape == (0, 2)


def test_small_distances_between_long_codes_are_exact():
    query_1D = 1000 + codes(1, 64)
    codes_ND = query_1D + 1e-3 * codes(50, 64, seed=1)
    found_QK, _ = nearest(query_1D, codes_ND, 50)
    torch.testing.assert_close(found_QK[0], distance(query_1D, codes_ND).sort().values)


def plainly(codes_ND: torch.Tensor, radius: float) -> list[bool]:
    """Which codes are kept, one after the other."""
    kept: list[int] = []
    for row, code_D in enumerate(codes_ND):
        if not any(distance(code_D, codes_ND[other]) <= radius for other in kept):
            kept.append(row)
    return [row in kept for row in range(len(codes_ND))]


@pytest.mark.parametrize("radius", [0.1, 0.5, 1.0])
def test_copies_lie_within_the_radius_of_one_that_is_kept(blocks, radius):
    codes_ND = codes(150)
    original_N = originals(codes_ND, radius)
    kept_N = original_N == torch.arange(150)
    assert kept_N.tolist() == plainly(codes_ND, radius)
    assert kept_N[original_N].all()
    assert (original_N <= torch.arange(150)).all()
    assert (distance(codes_ND, codes_ND[original_N]) <= radius).all()
    kept_KD = codes_ND[kept_N]
    assert len(kept_KD) < 150 or radius == 0.1
    apart_KK = torch.cdist(kept_KD, kept_KD) / 2 + 9 * torch.eye(len(kept_KD))
    assert apart_KK.min() > radius


def test_radius_zero_finds_equal_codes_only(blocks):
    codes_ND = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.1], [1.0, 2.0]])
    assert originals(codes_ND, 0).tolist() == [0, 0, 2, 0]
    assert originals(torch.zeros(0, 2), 1).tolist() == []
