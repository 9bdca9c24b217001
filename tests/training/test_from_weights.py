"""Runs that start from the weights of another, and runs that are not the one that is there."""

from pathlib import Path
from typing import Any

import pytest

from t5vae.checkpoint import retention
from t5vae.metrics.reading import read_metrics
from tests.launching import (
    run_of,
    steps_saved,
)
from tests.training.interrupted import EVERY, STEPS, resumed_step

pytestmark = pytest.mark.distributed


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
