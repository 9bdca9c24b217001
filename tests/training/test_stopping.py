"""Runs that are stopped through what started them: `deepspeed` itself, its shell, `make train`."""

import os
import shlex
import signal
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from t5vae.cluster.run_folder import lock_run
from t5vae.config import load_config
from t5vae.metrics.reading import read_metrics
from tests import launching
from tests.launching import (
    BIN,
    PATIENCE,
    TRAIN,
    Launch,
    launcher,
    lines_written,
    run_of,
    small_config,
    steps_saved,
    wait_until,
)

pytestmark = pytest.mark.distributed

STEPS = 100_000
ENDED = "the deepspeed process that started this run has ended"


@pytest.fixture
def launch(tmp_path):
    with launcher(tmp_path) as start:
        yield start


@pytest.fixture
def config(tmp_path, dataset):
    """Of a run that takes far longer than any test."""
    return small_config(tmp_path, dataset, train={"steps": STEPS}, checkpoint={"every": 0})


def runner_and_ranks(launch: Launch, run: Path) -> tuple[psutil.Process, list[psutil.Process]]:
    """DeepSpeed's processes, once they train."""
    before = lines_written(run)
    launch.wait_until(lambda: lines_written(run) > before)
    ranks = [launch.rank(0), launch.rank(1)]
    return ranks[0].parent().parent(), ranks


def check_saved(launch: Launch, run: Path, ranks: list[psutil.Process]) -> None:
    """The ranks end, with all of their steps saved and the run's folder free."""
    assert not psutil.wait_procs(ranks, PATIENCE)[1], launch.output()
    assert steps_saved(run)[-1] == read_metrics(run)[-1]["step"] < STEPS
    lock_run(load_config(run / "config.yaml").run_dir).close()


def test_ranks_outlive_their_runners_shell_and_end_with_the_runner(launch, config):
    run = run_of(config)
    started = launch("sh", "-c", f"{shlex.join(map(str, launching.deepspeed(config)))}; true")
    runner, ranks = runner_and_ranks(started, run)
    started.process.kill()
    started.end()
    orphaned = SimpleNamespace(is_alive=runner.is_running, output=started.output)
    seen = lines_written(run)
    wait_until(lambda: lines_written(run) > seen + 5, orphaned)

    runner.send_signal(signal.SIGINT)
    check_saved(started, run, ranks)
    (line,) = [line for line in started.output().splitlines() if ENDED in line]
    assert line == (
        f"{ENDED}: saved at step {steps_saved(run)[-1]:,}; the same command goes on from there"
    )


@pytest.mark.soak
def test_a_stopped_make_train_exports_nothing_and_goes_on_when_it_is_run_again(
    launch, config, tmp_path
):
    run = run_of(config)
    names = {"BIN": BIN, "CONFIG": config, "DATA": tmp_path / "data", "RUN": run}
    names["SET"] = f"train.steps={STEPS}"
    settings = [f"{name}={value}" for name, value in names.items()]
    make = ["make", "-C", TRAIN.parent, "--old-file=.venv/.installed", "train", *settings]

    killed = launch(*make)
    runner, ranks = runner_and_ranks(killed, run)
    runner.kill()
    assert killed.end() == 2, killed.output()
    check_saved(killed, run, ranks)
    assert killed.output().count(ENDED) == 1
    saved = steps_saved(run)[-1]

    told = launch(*make)
    _, ranks = runner_and_ranks(told, run)
    ranks[1].terminate()
    assert told.end() == 2, told.output()
    check_saved(told, run, ranks)
    assert saved < steps_saved(run)[-1]
    (line,) = [line for line in told.output().splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {run} is at step {steps_saved(run)[-1]:,} of {STEPS:,}: ")
    assert not {"export", "eval.json"} & set(os.listdir(run))
