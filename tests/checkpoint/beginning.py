"""Runs that start on some ranks, from what a folder holds."""

import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from t5vae.checkpoint.manifest import FORMAT
from t5vae.checkpoint.resuming import resume
from t5vae.cluster.run_folder import lock_run
from t5vae.common.errors import UserError

IDENTITY = {
    "format": FORMAT,
    "tokenizer": "aa",
    "model": {"latent_size": 8},
    "optimizer": "adamw",
    "seed": 0,
}
LAYOUT = {"world_size": 1, "mmd_batch": 16, "zero_stage": 0, "precision": "fp32"}


@pytest.fixture(autouse=True)
def _own_generators():
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


class Began:
    """A run that starts on some ranks, and what came of it."""

    def __init__(self, config, ranks, make_engine, identity, drop_after=None, **layout):
        self.said, self.dropped = [], []
        self.engines = [make_engine(seed=9) for _ in range(ranks.world)]

        def rank_main(rank):
            log = SimpleNamespace(
                enabled=rank == 0,
                say=self.said.append if rank == 0 else lambda text: None,
                drop_after=(drop_after or self.dropped.append) if rank == 0 else lambda step: None,
            )
            now = {**LAYOUT, "world_size": ranks.world, **layout}
            folder, settings = config.run_dir, config.checkpoint
            return resume(folder, settings, identity, now, self.engines[rank], log)

        everyone = ranks.run(rank_main)
        self.errors = [told.exception() for told in everyone]
        if not any(self.errors):
            self.start, *others = (told.result() for told in everyone)
            assert all(other == self.start for other in others)
            self.where = self.start.done, self.start.weights_from


@pytest.fixture
def begin(make_config, together, make_engine):
    """Starts the run of `make_config`; `begin.refused` gives why not, said alike on all ranks."""

    def start(world=1, identity=IDENTITY, layout=None, **sections):
        config = make_config(**sections)
        lock_run(config.run_dir).close()
        return Began(config, together(world), make_engine, identity, **(layout or {}))

    def began(*args, **kwargs):
        run = start(*args, **kwargs)
        for error in filter(None, run.errors):
            raise error
        return run

    def refused(*args, **kwargs):
        run = start(*args, **kwargs)
        assert all(isinstance(error, UserError) for error in run.errors), run.errors
        (message,) = {str(error) for error in run.errors}
        assert len(message.splitlines()) == 1
        return message

    began.refused = refused
    return began


@pytest.fixture
def run(make_config):
    return make_config().run_dir


@pytest.fixture
def other(tmp_path, save, make_engine):
    """Another run, of two ranks, with checkpoints of steps 10 and 20."""
    for step in (10, 20):
        save(tmp_path / "other/checkpoints", step, IDENTITY, make_engine(seed=step), world=2)
    return tmp_path / "other"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def damage(path):
    file = path / "rank-00000.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def weights(engine):
    return [parameter.detach() for parameter in engine.module.parameters()]


def are_weights_of(engine, wanted):
    pairs = zip(weights(engine), weights(wanted), strict=True)
    return all(one.equal(other) for one, other in pairs)


def from_weights(source=None):
    return {"resume": "weights", "source": source and str(source)}
