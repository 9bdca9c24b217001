"""A run that was never interrupted, for those that are to end as if they were not."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from t5vae.metrics.reading import read_metrics
from tests.launching import lines_written, rank_starter, run_of, small_config

EVERY = 5
STEPS = 50
WORLD = 2


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts ranks: start(world, config, *overrides, **what _slow_saves.py is to do)."""
    with rank_starter(tmp_path_factory.mktemp("ranks")) as starter:
        yield starter


@pytest.fixture(scope="module")
def write_config(dataset, tmp_path_factory):
    """Writes a run's configuration into a new folder that holds the run's own folder too."""

    def write(steps: int = STEPS, **sections: dict) -> Path:
        whole = {
            "optim": {"name": "adamw"},
            "train": {"steps": steps, "precision": "fp32"},
            "checkpoint": {"every": EVERY},
            **sections,
        }
        return small_config(tmp_path_factory.mktemp("run"), dataset, **whole)

    return write


@dataclass
class Golden:
    """A run that was never interrupted."""

    config: Path
    run: Path
    sequences: dict[int, list[list[int]]]


@pytest.fixture(scope="module")
def golden_run(start, write_config):
    """Makes a run of so many steps, never interrupted."""

    def make(steps: int) -> Golden:
        config = write_config(steps)
        run = run_of(config)
        done = start(WORLD, config, record=str(config.parent))
        assert done.end() == [0, 0], done.output()
        return Golden(config, run, sequences_read(config.parent))

    return make


@pytest.fixture(scope="module")
def golden(golden_run):
    return golden_run(STEPS)


def sequences_read(folder: Path) -> dict[int, list[list[int]]]:
    """The sequences that each rank read in each step; of one done again, in the last."""
    read: dict[int, list[list[int]]] = {}
    for rank in range(WORLD):
        lines = (folder / f"sequences-{rank}.jsonl").read_text().splitlines()
        last = {line["step"]: line["sequences"] for line in map(json.loads, lines)}
        for step in sorted(last):
            read.setdefault(step, []).append(last[step])
    return read


def last_step(run: Path) -> int:
    return read_metrics(run)[-1]["step"] if lines_written(run) else 0


def step_named(line: str) -> int:
    return int(line.partition("step-")[2][:8])


def resumed_step(output: str) -> int | None:
    """Where a run that has been started again goes on; None if it did not come so far."""
    lines = output.splitlines()
    found = [step_named(line) for line in lines if line.startswith("resuming from ")]
    begun = any(line.endswith(" steps") and " parameters, " in line for line in lines)
    return found[0] if found else 0 if begun else None


@pytest.fixture
def start_two(start):
    return lambda config, *overrides, **asked: start(WORLD, config, *overrides, **asked)


@pytest.fixture
def copy_of(golden, tmp_path):
    """The run that was never interrupted, to be damaged; and the setting that makes it the run."""
    run = tmp_path / "run"
    shutil.copytree(golden.run, run)
    return run, f"run.output_dir={run}"
