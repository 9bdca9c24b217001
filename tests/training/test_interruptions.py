"""Runs that are out of disk, told to stop, or short of a rank."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from t5vae.checkpoint.manifest import verify
from t5vae.cluster.scheduler import host_name
from tests.launching import (
    Ranks,
    exact_metrics,
    run_of,
    steps_saved,
)
from tests.training.interrupted import EVERY, STEPS, WORLD, last_step, resumed_step, step_named

pytestmark = pytest.mark.distributed


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 4 MiB of its own."""
    if not shutil.which("mount") or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_stops_a_run_or_costs_a_checkpoint_and_nothing_else(
    golden, small_disk, start_two, asynchronous
):
    run = small_disk / "run"
    settings = [f"run.output_dir={run}", f"checkpoint.asynchronous={asynchronous}"]
    folder, ballast = run / "checkpoints", small_disk / "ballast"

    stopped = start_two(golden.config, *settings, disk={2: "full"})
    assert stopped.end() == [2, 2], stopped.output()
    (line,) = stopped.errors()
    assert "No space left on device" in line
    assert f"step-{2 * EVERY:08d}" in line
    assert "Traceback" not in stopped.output()
    assert [path.name for path in folder.iterdir()] == [f"step-{EVERY:08d}"]
    assert verify(folder / f"step-{EVERY:08d}") is None

    ballast.unlink()
    settings.append("checkpoint.on_error=continue")
    going_on = start_two(golden.config, *settings, disk={1: "full", 3: "free"})
    assert going_on.end() == [0, 0], going_on.output()
    assert resumed_step(going_on.output()) == EVERY
    told = [line for line in going_on.output().splitlines() if "could not be saved" in line]
    assert [step_named(line) for line in told] == [2 * EVERY, 3 * EVERY]
    assert all("training goes on" in line for line in told)
    assert exact_metrics(run) == exact_metrics(golden.run)

    shutil.rmtree(folder / f"step-{STEPS:08d}")
    last = start_two(golden.config, *settings, disk={1: "full"})
    assert last.end() == [2, 2], last.output()
    (line,) = last.errors()
    assert f"step-{STEPS:08d} could not be saved" in line
    assert verify(folder / f"step-{STEPS - EVERY:08d}") is None


# Signals, and ranks that are lost.


@pytest.fixture
def three(start, write_config):
    """Starts three ranks that train until they are stopped, and waits for their first steps."""

    def begin(config: Path, *overrides: str) -> Ranks:
        options = ["data.global_batch_size=24", "checkpoint.every=0", *overrides]
        ranks = start(3, config, *options, record=str(config.parent))
        run = run_of(config)
        ranks.wait_until(lambda: resumed_step(ranks.output()) is not None)
        begun = resumed_step(ranks.output())
        ranks.wait_until(lambda: last_step(run) > begun + 5)
        return ranks

    return begin


def test_a_signal_to_one_rank_stops_all_at_the_same_step_with_one_checkpoint(three, write_config):
    config = write_config(1_000_000)
    run, stopped = run_of(config), []
    for number, rank in ((signal.SIGTERM, 1), (signal.SIGUSR2, 2)):
        ranks = three(config)
        assert resumed_step(ranks.output()) == (stopped[-1] if stopped else 0)
        ranks.send(number, rank)
        assert ranks.end() == [0, 0, 0], ranks.output()
        stopped.append(last_step(run))
        assert f"told to stop: saved at step {stopped[-1]:,}" in ranks.output()
        assert ranks.output().count("saved /") == 1
        assert steps_saved(run) == stopped
        ends = [(config.parent / f"sequences-{of}.jsonl").read_text().splitlines() for of in "012"]
        assert [json.loads(lines[-1])["step"] for lines in ends] == stopped[-1:] * 3
    assert stopped[0] < stopped[1]


@pytest.mark.parametrize(
    ("lost", "number", "timeout"),
    [(2, signal.SIGKILL, 20), (0, signal.SIGKILL, 20), (1, signal.SIGSTOP, 5)],
)
def test_the_other_ranks_end_in_time_and_name_the_one_that_is_lost(
    three, write_config, lost, number, timeout
):
    config = write_config(1_000_000)
    ranks = three(config, f"train.timeout={timeout}")
    ranks.send(number, lost)
    others = [rank for rank in range(3) if rank != lost]
    # Long before gloo's own 30 minutes, or PATIENCE: after 15 seconds more where nothing else runs.
    assert ranks.end(*others, patience=timeout + 60) == [1, 1], ranks.output(others[0])
    told = [line for rank in others for line in ranks.errors(rank)]
    assert told[0].startswith(f"error: rank {lost} of 3 on {host_name()} is lost: ")
    assert len(set(told)) == 1
    assert len(told) == 1 or lost == 0
    assert not any("Traceback" in ranks.output(rank) for rank in others)
    ranks.kill()


def test_a_second_interrupt_ends_a_run_at_once_with_130(start, write_config, tmp_path):
    stop_at = {"step": 5, "rank": 0, "marker": str(tmp_path / "paused")}
    config = write_config()
    ranks = start(WORLD, config, stop_at=stop_at)
    ranks.wait_until((tmp_path / "paused").exists)
    ranks.send(signal.SIGINT)
    time.sleep(0.2)  # two signals at once would be one
    assert ranks.is_alive()
    ranks.send(signal.SIGINT)
    code, other = ranks.end()
    assert code == 130
    assert other in (1, 130)  # waiting for the first one, it may hear of the signals after its end
    assert steps_saved(run_of(config)) == []
