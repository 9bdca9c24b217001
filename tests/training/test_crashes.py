"""Runs that are killed or damaged: none loses more than it may.

Ranks are forked by a process that has all imports (`launching.rank_starter`), but where a launcher
is named.
"""

import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shards import open_index
from t5vae.checkpoint import retention
from t5vae.checkpoint.manifest import verify
from tests.launching import (
    SLOW_SAVES,
    exact_metrics,
    launcher,
    run_of,
    steps_saved,
    torchrun,
)
from tests.training._slow_saves import POINTS, RANK_0_ALONE
from tests.training.interrupted import (
    EVERY,
    STEPS,
    WORLD,
    Golden,
    last_step,
    resumed_step,
    sequences_read,
)

pytestmark = pytest.mark.distributed


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


@pytest.mark.soak
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


# Damaged files.


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
    *_, newest, last = retention.list_checkpoints(run / "checkpoints")
    shutil.rmtree(last)  # with it the run would be done, as far as sizes tell
    flip_a_bit(newest / "rank-00001.safetensors")
    done = start_two(golden.config, override)
    assert done.end() == [0, 0], done.output()
    assert resumed_step(done.output()) == STEPS - 2 * EVERY
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
