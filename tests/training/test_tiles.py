"""The tiles of a run: chosen at its start, and kept when it goes on.

The last test starts this file itself, as a run of one rank.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from t5vae.config import BatchSplit, add_term
from t5vae.objective import Cost, Term
from t5vae.training import tiles
from t5vae.training.tiles import settle_tiles
from tests.launching import environment

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SPLIT = BatchSplit(64, ranks=2, micro=8, accumulation=4)


class Toy:
    """Three tiles; what they take here, and which is used."""

    tiles = ((1, 2), (3, 4), (5, 6))

    def __init__(self, *milliseconds: float):
        self.times, self.asked, self.used = list(milliseconds), [], None

    def milliseconds(self, rows, columns, device):
        self.asked.append((rows, columns, device))
        return self.times

    def use(self, tile):
        self.used = tile


class Objective:
    def __init__(self, **tilings: Toy | None):
        self.computed = {name: self for name in tilings}
        self.left = list(tilings.values())

    def tiling(self, latent_size):
        assert latent_size == 16
        return self.left.pop(0)


@pytest.fixture
def settle(monkeypatch):
    """`settle_tiles` of rank 0 of two, on a device of some kind; the other rank takes 5 ms."""

    def other_and(*own):
        return [max(5.0, value) for value in own]

    monkeypatch.setattr(tiles, "from_first", lambda decide: decide())
    monkeypatch.setattr(tiles, "all_max", other_and)

    def call(before, *, kind="H200", **tilings):
        monkeypatch.setattr(tiles, "_kind", lambda device: kind)
        return settle_tiles(Objective(**tilings), 16, SPLIT, CPU, before)

    return call


def test_the_slowest_ranks_times_decide(settle):
    toy = Toy(9.0, 7.0, 8.0)
    settled, (reason,) = settle({}, plain=None, toy=toy)
    assert settled == {"device": "H200", "toy": [3, 4]}
    assert toy.used == (3, 4)
    assert toy.asked == [(8, 16, CPU)]
    assert reason == "toy in tiles [3, 4]: the fastest of 3 on the slowest rank, 7 ms"
    assert settle({}, toy=Toy(1.0, 0.5, 9.0))[0]["toy"] == [1, 2]


def test_a_run_that_goes_on_keeps_its_tiles_and_nothing_is_timed(settle):
    toy = Toy(9.0, 7.0, 8.0)
    before = {"device": "H200", "toy": [5, 6]}
    assert settle(before, toy=toy) == (before, [])
    assert (toy.used, toy.asked) == ((5, 6), [])


@pytest.mark.parametrize(
    "before", [{"device": "A100", "toy": [5, 6]}, {"device": "H200", "toy": [5, 7]}]
)
def test_tiles_are_chosen_anew_on_another_device_or_where_they_are_gone(settle, before):
    settled, reasons = settle(before, toy=Toy(9.0, 7.0, 8.0))
    assert settled == {"device": "H200", "toy": [3, 4]}
    assert len(reasons) == 1


def test_a_run_without_tiles_has_none(settle):
    assert settle({}, plain=None) == ({}, [])


class Drifting(Term):
    """Times that favour another tile in every process."""

    @property
    def logs(self):
        return ("drifting",)

    def tiling(self, latent_size):
        started = Path("started")
        started.write_text(started.read_text() + "x" if started.exists() else "x")
        times = [9.0, 9.0, 9.0]
        times[len(started.read_text()) % 3] = 1.0
        return Toy(*times)

    def values(self, codes):
        return (codes.z_BD.float().mean() * 0,)

    def cost(self, rows, every, latent_size, *, accelerated):
        return Cost(0, 0, 0)


@pytest.mark.distributed
def test_a_restart_finds_the_tiles_in_its_checkpoint(dataset, tmp_path):
    said = []
    for steps in (1, 2):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, str(dataset), str(steps)],
            cwd=tmp_path,
            env=environment() | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(done.stdout + done.stderr)
    assert (tmp_path / "started").read_text() == "xx"
    assert "drifting in tiles [3, 4]: the fastest of 3" in said[0]
    assert "resuming from" in said[1]
    assert "tiles" not in said[1]


if __name__ == "__main__":
    from t5vae.training.main import main

    add_term("drifting", Drifting)
    settings = {
        "data.shards": sys.argv[1],
        "data.global_batch_size": 8,
        "run.output_dir": "run",
        "objective.drifting.weight": 1.0,
        "model.t5.d_model": 16,
        "model.t5.d_kv": 8,
        "model.t5.d_ff": 32,
        "model.t5.num_layers": 1,
        "model.t5.num_heads": 2,
        "model.latent_size": 8,
        "model.token_size": 4,
        "optim.name": "adamw",
        "train.precision": "fp32",
        "train.steps": sys.argv[2],
        "eval.every": 0,
        "log.every": 1,
    }
    sys.exit(main(["quickstart", *(f"{key}={value}" for key, value in settings.items())]))
