"""Runs of `train.minutes`: how many steps they get, and that the trial leaves no trace.

The last tests share ranks, for each of which this file itself is started once.
"""

import json
import os
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from t5vae.checkpoint.manifest import consolidated_weights
from t5vae.config import Config, Train, load_config
from t5vae.training import budget
from t5vae.training.budget import Pace
from t5vae.training.job import Job, with_steps_before
from tests.launching import exact_metrics, free_port, small_config

ROOT = Path(__file__).parents[2]
MINUTES, LONGER = 0.03, "zero 1, muon"
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.1}
CASES = {
    LONGER: {},
    "zero 0, bf16": {
        "train": {"precision": "bf16"},
        "deepspeed": {"zero_stage": 0},
        "eval": {"every": 7, "sequences": 20, "decoded": 4},
    },
    "zero 3, adamw, accumulation, dropout": {
        "data": {"micro_batch_size": 4},
        "model": {"t5": T5, "latent_size": 8, "token_size": 4},
        "optim": {"name": "adamw"},
        "deepspeed": {"zero_stage": 3},
    },
}
PACE = Pace(start=10.0, step=0.5, evaluation=4.0, save=1.0)


def config(evaluations: int = 0, saves: int = 0, **train: object) -> Config:
    return Config(
        data={"shards": "x"},
        eval={"every": evaluations},
        checkpoint={"every": saves},
        train=train,
    )


@pytest.mark.parametrize(
    ("seconds", "evaluations", "saves", "steps"),
    [
        (61, 0, 0, 100),  # 10 s to start, 50 s of steps, a save at the end
        (60.9, 0, 0, 99),
        (61, 0, 50, 98),  # another save
        (65, 100, 0, 100),
        (64, 100, 0, 98),
        (10, 0, 0, 1),  # one at least
        (-50, 0, 0, 1),
    ],
)
def test_steps_evaluations_and_saves_fit_into_the_time(seconds, evaluations, saves, steps):
    pace = PACE if evaluations else replace(PACE, evaluation=0.0)
    assert pace.steps_in(seconds, config(evaluations, saves)) == steps


@given(st.integers(1, 300), st.integers(0, 20), st.integers(0, 20))
def test_a_run_is_evaluated_and_saved_as_the_loop_does(steps, evaluations, saves):
    job = Job(config(evaluations, saves, steps=steps), None, None, None, 0, None, {})
    saved = [step for step in range(1, steps + 1) if job.saves_after(step)]
    evaluated = [step for step in range(1, steps + 1) if job.evaluates_after(step)]
    pace = Pace(0.0, 0.0, evaluation=1.0, save=1000.0)
    if evaluations:
        assert pace.whole(steps, job.config) == len(evaluated) + 1000 * len(saved)


@pytest.fixture
def folder(tmp_path, save, make_config):
    """A run's folder as it is after 10 steps of what `train` says."""

    def make(**train: object) -> Config:
        made = make_config(train={"precision": "fp32", **train})
        save(made.run_dir / "checkpoints", 10)
        made.write()
        return made

    return make


def with_minutes(before: Config, minutes: float) -> Config:
    """As a preset that says otherwise, with minutes given."""
    train = before.train.model_copy(update={"steps": 4000, "minutes": minutes})
    return before.model_copy(update={"train": train})


@pytest.mark.parametrize(("minutes", "steps"), [(7, 140), (14, 280), (3.5, 70), (0.001, 1)])
def test_a_run_that_goes_on_has_its_steps_in_proportion_to_its_minutes(folder, minutes, steps):
    before = folder(steps=140, minutes=7)
    now = with_steps_before(with_minutes(before, minutes)).train
    assert (now.steps, now.minutes) == (steps, minutes)


def test_a_run_of_a_fixed_number_of_steps_keeps_it(folder):
    now = with_steps_before(with_minutes(folder(steps=60), 7)).train
    assert (now.steps, now.minutes) == (60, None)


def test_without_a_checkpoint_to_go_on_from_steps_are_not_known(folder, make_config):
    before = with_minutes(folder(steps=140, minutes=7), 7)
    anew = before.model_copy(
        update={"checkpoint": make_config(checkpoint={"resume": "weights"}).checkpoint}
    )
    assert with_steps_before(anew) == anew
    (before.run_dir / "config.yaml").write_text("[")
    assert with_steps_before(before) == before


def test_a_configuration_of_steps_stays_as_it_is(folder):
    config = folder(steps=140, minutes=7)
    train = config.train.model_copy(update={"minutes": None})
    fixed = config.model_copy(update={"train": train})
    assert with_steps_before(fixed) == fixed


def rank_main(rank: int, folder: Path) -> None:
    """Each case by minutes, then by the steps that it got; and one more minutes.

    All in one process group, from which no run may take anything over: a trial's engine must be
    gone when the run's own is built.
    """
    from t5vae.cluster.ranks import Ranks
    from t5vae.cluster.stopping import StopRequest
    from t5vae.cluster.together import Together
    from t5vae.training import loop, start

    ranks = Ranks(rank, 2, rank, 2, "127.0.0.1", int(os.environ["PORT"]))
    start_process_group, destroy, build = (
        start.start_process_group,
        dist.destroy_process_group,
        start.build,
    )
    made: list[weakref.ref] = []

    def start_once(*arguments: Any, **options: Any) -> torch.device:
        if dist.is_initialized():
            return torch.device("cpu")
        return start_process_group(*arguments, **options)

    def build_when_all_are_gone(*arguments: Any) -> Any:
        assert all(part() is None for part in made), "the trial's engine is still there"
        engine = build(*arguments)
        parts = [engine, engine.optimizer, *engine.module.parameters()]
        made.extend(map(weakref.ref, parts))
        return engine

    def run(*settings: str) -> Train:
        config = load_config(case, settings)
        loop.run(config, Together(ranks, config.run_dir, 60), StopRequest())
        made.clear()
        return load_config(config.run_dir / "config.yaml").train

    start.start_process_group, start.build = start_once, build_when_all_are_gone
    dist.destroy_process_group = lambda: None
    budget.SECONDS = 0.2
    budget.process_seconds = lambda: 0.0  # this process has more than one run
    for case in sorted(folder.glob("*/small.yaml")):
        got = run(f"train.minutes={MINUTES}")
        run(f"train.steps={got.steps}", f"run.output_dir={case.parent}/fixed")
        if case.parent.name == LONGER:
            run(f"train.minutes={2 * MINUTES}")
    destroy()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dataset, run_ranks):
    """Folders of each case: `run` by minutes, `fixed` by the steps that it got."""
    folder = tmp_path_factory.mktemp("minutes")
    for name, sections in CASES.items():
        (folder / name).mkdir()
        data = {"global_batch_size": 16, **sections.get("data", {}), "shards": str(dataset)}
        small_config(folder / name, dataset, **{**sections, "data": data})
    run_ranks(
        __file__, 2, folder, PORT=str(free_port()), DS_ACCELERATOR="cpu", PYTHONPATH=str(ROOT)
    )
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in CASES if name != LONGER])
def test_a_run_of_minutes_is_that_of_its_steps_bit_for_bit(runs, name):
    by_minutes, fixed = runs / name / "run", runs / name / "fixed"
    kept = load_config(by_minutes / "config.yaml").train
    assert kept.minutes == MINUTES
    assert exact_metrics(by_minutes) == exact_metrics(fixed)
    last = f"checkpoints/step-{kept.steps:08d}"
    weights = [consolidated_weights(run / last) for run in (by_minutes, fixed)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert sorted(path.name for path in by_minutes.iterdir()) == sorted(
        path.name for path in fixed.iterdir()
    )


@pytest.mark.distributed
def test_twice_the_minutes_go_on_to_twice_the_steps(runs):
    folder = runs / LONGER
    first = load_config(folder / "fixed/config.yaml").train.steps
    now = load_config(folder / "run/config.yaml").train
    assert (now.minutes, now.steps) == (2 * MINUTES, 2 * first)
    lines = exact_metrics(folder / "run")
    assert json.loads(lines[-1])["step"] == 2 * first


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
