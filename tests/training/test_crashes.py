"""Runs that are killed, damaged, out of disk or short of a rank: none loses more than it may.

Ranks are forked by a process that has all imports (`launching.rank_starter`), but where a launcher
is named.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shards import open_index
from t5vae.checkpoint import retention
from t5vae.checkpoint.manifest import verify
from t5vae.metrics.reading import read_metrics
from tests.launching import (
    SLOW_SAVES,
    Ranks,
    exact_metrics,
    launcher,
    lines_written,
    rank_starter,
    run_of,
    small_config,
    steps_saved,
    torchrun,
)
from tests.training._slow_saves import POINTS, RANK_0_ALONE

pytestmark = pytest.mark.distributed

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


@dataclass
class Kill:
    """When to kill a run.

    Attributes:
        point: of a save, at which a rank pauses; None outside of saves.
        save: its number since the start.
        rank: that pauses.
        steps: done since the last checkpoint, where there is no point.
        seconds: that follow.
    """

    point: str | None = None
    save: int = 1
    rank: int = 0
    steps: int = 0
    seconds: float = 0.0


def random_kill(chance: random.Random) -> Kill:
    """At any time: while it starts, between saves, or inside one."""
    kind = chance.choice(["start", "steps", "save"])
    if kind == "start":
        return Kill(seconds=chance.uniform(0, 1))
    if kind == "steps":
        return Kill(steps=chance.randint(1, EVERY + 2), seconds=chance.uniform(0, 0.02))
    point = chance.choice(POINTS)
    rank = 0 if point in RANK_0_ALONE else chance.randrange(WORLD)
    save = 2 if point == "while the old one is deleted" else chance.choice([1, 2])
    return Kill(point, save, rank)


def start_and_kill(start_run: Callable[..., Any], config: Path, kill: Kill, saved: int) -> Any:
    """Start a run whose last checkpoint is of the step `saved`, and kill it."""
    marker = config.parent / "paused"
    marker.unlink(missing_ok=True)
    asked: dict[str, Any] = {"record": str(config.parent)}
    if kill.point:
        where = {"point": kill.point, "save": kill.save, "rank": kill.rank}
        asked["pause"] = {**where, "marker": str(marker)}
    running = start_run(config, **asked)

    def has_begun() -> bool:
        return resumed_step(running.output()) is not None

    if kill.point:
        running.wait_until(marker.exists)
    elif kill.steps:
        running.wait_until(lambda: has_begun() and last_step(run_of(config)) >= saved + kill.steps)
    time.sleep(kill.seconds)
    running.kill()
    return running


def kill_until_done(
    start_run: Callable[..., Any], config: Path, golden: Golden, kills: list[Kill], most_lost: int
) -> None:
    """Kill a run at each of these moments, let it end, and compare it with one never interrupted.

    Args:
        start_run: starts the run, with what _slow_saves.py is to do.
        most_lost: steps that a crash may cost.
    """
    run = run_of(config)
    furthest, history = 0, []
    for kill in [*kills, None]:
        saved = max(steps_saved(run), default=0)
        if kill:
            running = start_and_kill(start_run, config, kill, saved)
        else:
            running = start_run(config, record=str(config.parent))
            assert running.end() in (0, [0] * WORLD), running.output()
        resumed = resumed_step(running.output())
        history.append((kill, saved, resumed))
        assert "damaged" not in running.output(), history
        if resumed is not None:
            assert resumed >= furthest - most_lost, (furthest, history)
        furthest = max(furthest, last_step(run))
        for left in retention.list_checkpoints(run / "checkpoints"):
            assert verify(left) is None, history
    assert exact_metrics(run) == exact_metrics(golden.run), history
    assert sequences_read(config.parent) == golden.sequences, history
    assert list((run / "checkpoints").glob("*.*")) == []


@pytest.fixture
def start_two(start):
    return lambda config, *overrides, **asked: start(WORLD, config, *overrides, **asked)


def test_every_sequence_is_read_exactly_once_an_epoch(golden, dataset):
    number = open_index(dataset).sequences("train")
    assert 2 * number < STEPS * 16
    counts: Counter[int] = Counter()
    for step, ranks in golden.sequences.items():
        counts.update(sequence for rank in ranks for sequence in rank)
        passes, more = divmod(16 * step, number)
        often = Counter(counts[sequence] for sequence in range(number))
        assert often == +Counter({passes: number - more, passes + 1: more}), step
    assert sorted(golden.sequences) == list(range(1, STEPS + 1))


def test_a_run_that_torchrun_started_and_that_is_killed_three_times_ends_as_if_it_never_was(
    golden, write_config, tmp_path
):
    chance = random.Random(os.urandom(8))
    kills = [
        Kill(steps=chance.randint(1, EVERY + 2), seconds=chance.uniform(0, 0.02)),
        Kill("half-way through the write", save=2, rank=chance.randrange(WORLD)),
        Kill(steps=chance.randint(1, EVERY + 2), seconds=chance.uniform(0, 0.02)),
    ]
    with launcher(tmp_path) as launch:

        def start_run(config: Path, **asked: Any) -> Any:
            return launch(*torchrun(SLOW_SAVES, config), SLOW_SAVES=json.dumps(asked))

        kill_until_done(start_run, write_config(), golden, kills, most_lost=EVERY)


def test_a_run_killed_at_every_point_of_a_save_ends_as_if_it_never_was(
    golden, write_config, start_two
):
    kills = [
        Kill(point, save=1 + number % 2, rank=0 if point in RANK_0_ALONE else number % WORLD)
        for number, point in enumerate(POINTS)
    ]
    config = write_config(checkpoint={"every": EVERY, "keep_last": 1})
    kill_until_done(start_two, config, golden, kills, most_lost=EVERY)


def test_a_run_that_saves_while_it_trains_loses_two_intervals_at_most(
    golden, write_config, start_two
):
    """The checkpoint that is not whole yet, and the steps since."""
    config = write_config(checkpoint={"every": EVERY, "asynchronous": True})
    kills = [
        Kill("before the gather", save=2, rank=1),
        Kill("half-way through the write", save=2, seconds=0.2),
        Kill("before the rename", save=2),
        Kill(steps=EVERY + 2),
    ]
    kill_until_done(start_two, config, golden, kills, most_lost=2 * EVERY)


def test_training_goes_on_while_a_checkpoint_is_written(write_config, start_two):
    config = write_config(checkpoint={"every": EVERY, "asynchronous": True})
    marker = config.parent / "paused"
    pause = {"point": "half-way through the write", "save": 2, "rank": 1, "marker": str(marker)}
    running = start_two(config, pause=pause)
    running.wait_until(lambda: marker.exists() and last_step(run_of(config)) == 3 * EVERY)
    assert steps_saved(run_of(config)) == [EVERY]
    running.kill()


@pytest.mark.soak
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_killed_at_many_random_moments_ends_as_if_it_never_was(
    golden_run, write_config, start_two, asynchronous
):
    number = int(os.environ.get("T5VAE_SOAK_KILLS", "20"))
    chance = random.Random(os.urandom(8))
    kills = [random_kill(chance) for _ in range(number)]
    steps = 3 * EVERY * (number + 1)
    settings = {"every": EVERY, "keep_last": 1, "asynchronous": asynchronous}
    config = write_config(steps, checkpoint=settings)
    most_lost = EVERY * (2 if asynchronous else 1)
    kill_until_done(start_two, config, golden_run(steps), kills, most_lost)


# Damaged files.


@pytest.fixture
def copy_of(golden, tmp_path):
    """The run that was never interrupted, to be damaged; and the setting that makes it the run."""
    run = tmp_path / "run"
    shutil.copytree(golden.run, run)
    return run, f"run.output_dir={run}"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00001.safetensors", "manifest"])
def test_a_damaged_file_makes_the_checkpoint_before_the_newest(copy_of, name, damage):
    folder = copy_of[0] / "checkpoints"
    name = name.replace("manifest", "manifest.json")
    damage(folder / f"step-{STEPS:08d}" / name)
    told: list[str] = []
    newest = retention.newest_valid(folder, told.append)
    assert newest == folder / f"step-{STEPS - EVERY:08d}"
    assert len(told) == 1
    assert told[0].startswith(f"step-{STEPS:08d} is damaged ")
    assert name in told[0]


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    golden, copy_of, start_two
):
    run, override = copy_of
    flip_a_bit(run / "checkpoints" / f"step-{STEPS:08d}" / "rank-00001.safetensors")
    done = start_two(golden.config, override)
    assert done.end() == [0, 0], done.output()
    assert resumed_step(done.output()) == STEPS - EVERY
    (told,) = [line for line in done.output().splitlines() if "damaged" in line]
    assert "rank-00001.safetensors has changed" in told
    assert exact_metrics(run) == exact_metrics(golden.run)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_nothing_is_deleted(
    golden, copy_of, start_two
):
    run, override = copy_of
    folders = retention.list_checkpoints(run / "checkpoints")
    for folder in folders:
        truncate(folder / "rank-00000.safetensors")
    files = Counter(path.name for path in run.rglob("*") if path.is_file())
    metrics = (run / "metrics.jsonl").read_bytes()
    for _ in range(2):
        refused = start_two(golden.config, override)
        assert refused.end() == [2, 2], refused.output()
        (line,) = refused.errors()
        assert "Traceback" not in refused.output()
        for folder in folders:
            assert f"{folder.name}.damaged-0" in line
        assert Counter(path.name for path in run.rglob("*") if path.is_file()) >= files
        assert (run / "metrics.jsonl").read_bytes() == metrics


# A full disk.


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
    for rank in others:
        (line,) = ranks.errors(rank)
        names = re.fullmatch(r"error: rank ([0-9, ]+) of 3 is lost: .*", line)
        assert names
        assert str(lost) in names[1].split(", ")
        assert "Traceback" not in ranks.output(rank)
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


# Weights of another run, and runs that are not this one.


def level(lines: list[dict[str, Any]]) -> float:
    return sum(line["nats_per_token"] for line in lines) / len(lines)


def check_started_from(weights: Path, run: Path, metrics: list[dict[str, Any]]) -> None:
    """A run counts from 1 and begins about where another ended, whose metrics these are."""
    first = read_metrics(run)[0]
    assert first["step"] == 1
    assert first["consumed"] == first["step"] * 24
    fell = level(metrics[:1]) - level(metrics[-10:])
    assert fell > 1
    assert first["nats_per_token"] == pytest.approx(level(metrics[-10:]), abs=fell / 4)
    manifest = retention.newest_manifest(run / "checkpoints")
    assert manifest is not None
    assert manifest["weights_from"] == str(weights)


WEIGHTS = ("checkpoint.resume=weights", "data.global_batch_size=24", "train.steps=20")


def test_a_run_starts_from_the_weights_of_another_once(golden, write_config, start):
    config = write_config()
    run, marker = run_of(config), config.parent / "paused"
    weights = golden.run / "checkpoints" / f"step-{STEPS:08d}"
    settings = [*WEIGHTS, f"checkpoint.source={golden.run}"]
    before = {path: path.stat().st_mtime_ns for path in golden.run.rglob("*")}

    pause = {"point": "before the rename", "save": 2, "rank": 0, "marker": str(marker)}
    first = start(3, config, *settings, pause=pause)
    first.wait_until(marker.exists)
    first.kill()
    assert f"starting from the weights of {weights}" in first.output()
    check_started_from(weights, run, read_metrics(golden.run))

    second = start(3, config, *settings)
    assert second.end() == [0, 0, 0], second.output()
    assert resumed_step(second.output()) == EVERY
    assert "starting from the weights" not in second.output()
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 21))
    check_started_from(weights, run, read_metrics(golden.run))
    assert {path: path.stat().st_mtime_ns for path in golden.run.rglob("*")} == before

    third = start(3, config, *settings)
    assert third.end() == [0, 0, 0]
    assert "already trained" in third.output()


def test_a_run_starts_from_its_own_weights_and_is_set_aside_once(golden, copy_of, start, tmp_path):
    run, override = copy_of
    weights = run / "before-0" / "checkpoints" / f"step-{STEPS:08d}"
    settings = [*WEIGHTS, override]
    for save, where in ((1, "before the rename"), (2, "before the manifest")):
        marker = tmp_path / f"paused-{save}"
        pause = {"point": where, "save": save, "rank": 0, "marker": str(marker)}
        killed = start(3, golden.config, *settings, pause=pause)
        killed.wait_until(marker.exists)
        killed.kill()
        assert f"starting from the weights of {weights}" in killed.output()
    metrics = read_metrics(run / "before-0")
    assert metrics == read_metrics(golden.run)
    check_started_from(weights, run, metrics)

    last = start(3, golden.config, *settings)
    assert last.end() == [0, 0, 0], last.output()
    assert resumed_step(last.output()) == EVERY
    assert steps_saved(run) == [10, 15, 20]
    assert steps_saved(run / "before-0") == steps_saved(golden.run)
    assert not (run / "before-1").exists()


@pytest.mark.parametrize("resume", ["auto", "weights"])
def test_weights_of_another_model_are_refused_with_both_sizes(golden, copy_of, start_two, resume):
    settings = [copy_of[1], f"checkpoint.resume={resume}", "train.steps=60"]
    refused = start_two(golden.config, *settings, "model.latent_size=12")
    assert refused.end() == [2, 2], refused.output()
    (line,) = refused.errors()
    assert "model.latent_size 8, this run has 12" in line


@pytest.mark.parametrize(("resume", "what"), [("auto", "shards"), ("weights", "tokenizer")])
def test_another_tokenizer_is_refused_with_both_fingerprints(
    golden, copy_of, start_two, dataset, other_dataset, resume, what
):
    run, override = copy_of
    settings = [override, f"checkpoint.resume={resume}", "train.steps=60"]
    refused = start_two(golden.config, *settings, f"data.shards={other_dataset}")
    assert refused.end() == [2, 2], refused.output()
    (line,) = refused.errors()
    manifest = retention.newest_manifest(golden.run / "checkpoints")
    assert manifest is not None
    assert f'{what} "{manifest[what]}", this run has "' in line
    assert (run / "metrics.jsonl").read_bytes() == (golden.run / "metrics.jsonl").read_bytes()
