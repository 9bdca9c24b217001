"""Which tile a Triton kernel takes, without running it."""

import pytest
import torch

from t5vae.objective.kernels import make_kernel
from t5vae.objective.terms.mmd import MMD

pytest.importorskip("triton")
fused = pytest.importorskip("t5vae.objective.fused")

TIMES = {tile: 9.0 - number for number, tile in enumerate(fused.tiles_of(64, True, False))}


@pytest.fixture
def timed(monkeypatch):
    """The tiles that are timed; the last is the fastest."""
    tiles = []

    def milliseconds(x_BD, y_ND, kernel, precision, tile):
        tiles.append(tile)
        return TIMES[tile]

    monkeypatch.setattr(fused, "_milliseconds", milliseconds)
    monkeypatch.setattr(fused, "_chosen", {})
    monkeypatch.setattr(fused.triton.knobs.runtime, "interpret", False)
    return tiles


def tile_of(kernel: str, dimensions: int) -> tuple[int, ...]:
    codes_BD = torch.zeros(2, dimensions)
    return fused._fastest(codes_BD, codes_BD, make_kernel(kernel, dimensions), "fp16")


def test_the_fastest_tile_is_found_once_for_each_problem(timed):
    fastest = list(TIMES)[-1]
    assert tile_of("imq", 64) == tile_of("imq", 64) == tile_of("imq", 50) == fastest
    assert timed == list(TIMES)
    tile_of("multi_rbf", 64)
    assert len(timed) == 2 * len(TIMES)


def test_a_tile_that_a_run_began_with_is_used_and_nothing_is_timed(timed):
    tiling = MMD(kernel="imq", implementation="triton").tiling(64)
    assert tiling.tiles == tuple(TIMES)
    slowest = tiling.tiles[0]
    tiling.use(slowest)
    assert tile_of("imq", 64) == slowest
    assert timed == []


def test_each_tile_is_timed_in_its_place(timed):
    tiling = MMD(kernel="imq", implementation="triton").tiling(64)
    assert tiling.milliseconds(2, 8, torch.device("cpu")) == list(TIMES.values())


def test_what_is_written_in_torch_has_no_tiles():
    assert MMD().tiling(64) is None
