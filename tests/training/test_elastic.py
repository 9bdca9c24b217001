"""Runs that stop and go on, on the same ranks and on others."""

from collections import Counter
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from t5vae.checkpoint import retention
from t5vae.checkpoint.manifest import consolidated_weights, open_fragments, read_manifest
from tests.training.many_runs import BATCH, SEQUENCES, STAGES, Folder, Settings, settings_of

pytestmark = pytest.mark.distributed


def state_of(saved: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Weights and moments of a checkpoint, flattened, by kind and parameter."""
    found = open_fragments(saved)
    keys = [key for key in found.contents() if key[0] != "random"]
    return {key: found.read(*key, 0, found.length(*key)) for key in keys}


# Resumed on the same ranks.

EXACT_STEPS, STOP = 5, 3
OFFLOAD = {"deepspeed.offload_optimizer": True}
OFFLOAD_ALL = {**OFFLOAD, "deepspeed.offload_parameters": True}
FP16 = {
    "train.precision": "fp16",
    "deepspeed.config": {"fp16": {"initial_scale_power": 14, "loss_scale_window": 2}},
}
FOUR_MICRO_BATCHES = {"data.micro_batch_size": 9}


EXACT = {
    "zero 0, adamw, fp32": settings_of(0, "adamw", "fp32"),
    "zero 0, adamw, bf16": settings_of(0, "adamw", "bf16"),
    "zero 0, muon, bf16": settings_of(0, "muon", "bf16", **FOUR_MICRO_BATCHES),
    "zero 1, adamw, fp32": settings_of(1, "adamw", "fp32", **FOUR_MICRO_BATCHES),
    "zero 1, muon, bf16": settings_of(1, "muon", "bf16", **FOUR_MICRO_BATCHES),
    "zero 2, adamw, bf16": settings_of(2, "adamw", "bf16", **FOUR_MICRO_BATCHES),
    "zero 2, muon, fp32": settings_of(2, "muon", "fp32", **FOUR_MICRO_BATCHES),
    "zero 3, adamw, bf16": settings_of(3, "adamw", "bf16", **FOUR_MICRO_BATCHES),
    "zero 3, muon, fp32": settings_of(3, "muon", "fp32"),
    "offload 1, adamw": settings_of(1, "adamw", "bf16", **OFFLOAD, **FOUR_MICRO_BATCHES),
    "offload 1, muon": settings_of(1, "muon", "fp32", **OFFLOAD),
    "offload 3, muon": settings_of(3, "muon", "bf16", **OFFLOAD, **FOUR_MICRO_BATCHES),
    "offload 3, weights too": settings_of(3, "adamw", "bf16", **OFFLOAD_ALL),
    "fp16 1": settings_of(1, "adamw", "fp16", **FP16),
    "fp16 3": settings_of(3, "muon", "fp16", **FP16),
    "asynchronous": settings_of(
        1, "muon", "bf16", **{"checkpoint.asynchronous": True, "checkpoint.every": 1}
    ),
    "dropout 2": settings_of(2, "adamw", "fp32", **{"model.t5.dropout_rate": 0.1}),
    "dropout 3": settings_of(3, "adamw", "bf16", **{"model.t5.dropout_rate": 0.1}),
    "noise": settings_of(
        0, "muon", "fp32", **{"objective.word_dropout": 0.2, "objective.input_mask": 0.2}
    ),
}
KINDS = {"adamw": 3, "muon": 4}  # weights, and the moments of each


@pytest.fixture(scope="module")
def exact(short_dataset, tmp_path_factory) -> Folder:
    """Every run in one go, and stopped in the middle and gone on with in new processes."""
    folder = Folder(tmp_path_factory.mktemp("exact"))
    first, second = [], []
    for name, settings in EXACT.items():
        settings = {**settings, "train.steps": EXACT_STEPS}
        first.append(folder.run(f"{name}.golden", f"{name}.golden", settings))
        first.append(folder.run(f"{name}.first", name, settings, stop_at=STOP))
        second.append(folder.run(f"{name}.second", name, settings))
    folder.start(short_dataset, [(2, first), (2, second)])
    return folder


@pytest.mark.parametrize("name", EXACT)
def test_a_run_that_goes_on_in_new_processes_repeats_metrics_weights_and_moments_exactly(
    exact, name
):
    assert f"told to stop: saved at step {STOP}" in exact.seen(f"{name}.first")[0]["output"]
    assert "resuming from" in exact.seen(f"{name}.second")[0]["output"]
    golden = f"{name}.golden"
    assert len(exact.metrics(golden)) == EXACT_STEPS
    assert exact.metrics(name) == exact.metrics(golden)
    manifests = [read_manifest(exact.last(out)) for out in (name, golden)]
    for key in ("step", "scalars", "data", "watch", "layout"):
        assert manifests[0][key] == manifests[1][key], key
    assert manifests[0]["ranges"]
    found, wanted = state_of(exact.last(name)), state_of(exact.last(golden))
    assert found.keys() == wanted.keys()
    assert len({kind for kind, _ in found}) == KINDS[EXACT[name]["optim.name"]]
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", [name for name in EXACT if "fp16" in name])
def test_the_loss_scale_of_fp16_moved_before_and_after_the_stop(exact, name):
    saved = retention.list_checkpoints(exact.path / name / "checkpoints")
    states = [read_manifest(path)["scalars"]["loss_scale"] for path in saved]
    at_the_stop, at_the_end = (state["cur_scale"] for state in states)
    assert at_the_stop != 2**14
    assert at_the_end != at_the_stop


# Resumed on other ranks, at other stages.


class Leg(NamedTuple):
    """A part of a run."""

    world: int
    stage: int
    until: int
    precision: str = "fp32"


def same_stage(stage: int) -> list[Leg]:
    return [Leg(2, stage, 2), Leg(3, stage, 4), Leg(1, stage, 6), Leg(2, stage, 8)]


ELASTIC_STEPS = 8
JOURNEYS = {
    f"{optimizer}: ranks 2, 3, 1, 2 at zero {stage}": same_stage(stage)
    for optimizer in ("adamw", "muon")
    for stage in STAGES
} | {
    "adamw: zero 1, 2, 1": [Leg(2, 1, 3), Leg(2, 2, 6), Leg(2, 1, 8)],
    "muon: zero 1, 3, 1": [Leg(2, 1, 3), Leg(2, 3, 6), Leg(2, 1, 8)],
    "adamw: zero 0, 3, 2, 0": [Leg(2, 0, 2), Leg(2, 3, 4), Leg(2, 2, 6), Leg(2, 0, 8)],
    "muon: ranks and zero": [Leg(2, 0, 2), Leg(3, 3, 4), Leg(1, 2, 6), Leg(2, 1, 8)],
}
MIXED_PRECISION = {
    "adamw: bf16, fp32 at zero 1": [Leg(2, 1, 4, "bf16"), Leg(2, 1, 8)],
    "muon: fp32, bf16 at zero 0": [Leg(2, 0, 4), Leg(2, 0, 8, "bf16")],
    "adamw: bf16, fp32 at ranks and zero": [Leg(2, 3, 4, "bf16"), Leg(3, 0, 8)],
}
SMALLER_MMD = "adamw: micro batches of 18"
INITIAL = {"flatten": "fp32", "attention": "bf16"}


def journey_settings(name: str, leg: Leg) -> Settings:
    return {
        "deepspeed.zero_stage": leg.stage,
        "optim.name": name.split(":")[0],
        "train.precision": leg.precision,
        "optim.muon_precision": "fp32",
        "train.steps": ELASTIC_STEPS,
    }


@pytest.fixture(scope="module")
def elastic(short_dataset, tmp_path_factory) -> Folder:
    """Every journey, leg by leg, and a run of two ranks in one go."""
    folder = Folder(tmp_path_factory.mktemp("elastic"))
    launches: list[tuple[int, list]] = []
    start = Leg(2, 1, ELASTIC_STEPS)
    runs = [
        folder.run(f"{name}.golden", f"{name}.golden", journey_settings(name, start))
        for name in KINDS
    ]
    small = {**journey_settings(SMALLER_MMD, start), "data.micro_batch_size": 18}
    runs.append(folder.run(f"{SMALLER_MMD}.golden", f"{SMALLER_MMD}.golden", small))
    runs.append(folder.run(f"{SMALLER_MMD}.0", SMALLER_MMD, small, stop_at=4))
    for (bottleneck, precision), stage in product(INITIAL.items(), STAGES):
        standing = {"train.steps": 1, "optim.lr": 1e-30, "model.bottleneck": bottleneck}
        settings = journey_settings("adamw", Leg(2, stage, 1, precision)) | standing
        runs.append(folder.run(f"{bottleneck} {stage}", f"{bottleneck} {stage}", settings))
    launches.append((2, runs))
    journeys = JOURNEYS | MIXED_PRECISION
    for number in range(4):
        of_world: dict[int, list] = {}
        for name, legs in journeys.items():
            if number < len(legs):
                leg = legs[number]
                run = folder.run(
                    f"{name}.{number}", name, journey_settings(name, leg), stop_at=leg.until
                )
                of_world.setdefault(leg.world, []).append(run)
        launches += of_world.items()
    launches.append((1, [folder.run(f"{SMALLER_MMD}.1", SMALLER_MMD, small)]))
    folder.start(short_dataset, launches)
    return folder


def golden_of(name: str) -> str:
    return f"{name.split(':')[0]}.golden"


def global_batches(seen: list[dict[str, Any]]) -> dict[int, Counter[int]]:
    """The sequences of each step, over all ranks."""
    found: dict[int, Counter[int]] = {}
    for rank in seen:
        for step, sequences in rank["sequences"].items():
            found.setdefault(int(step), Counter()).update(sequences)
    return found


@pytest.mark.parametrize("name", JOURNEYS)
def test_a_run_goes_on_at_other_ranks_and_stages_with_the_same_losses(elastic, name):
    found, golden = elastic.metrics(name), elastic.metrics(golden_of(name))
    assert [line["step"] for line in found] == list(range(1, ELASTIC_STEPS + 1))
    rounded = 1e-4 if "muon" in name else 1e-6  # Muon's iteration lifts rounding
    mean_of_kernels = 2**-23  # MMD² is a difference of such means, of up to 1: float32's rounding
    for line, wanted in zip(found, golden, strict=True):
        for key in ("loss", "reconstruction", "mmd"):
            absolute = mean_of_kernels if key == "mmd" else 0
            close = pytest.approx(wanted[key], rel=rounded, abs=absolute)
            assert line[key] == close, (line["step"], key)
    for saved in retention.list_checkpoints(elastic.path / name / "checkpoints"):
        assert read_manifest(saved)["ranges"], saved


@pytest.mark.parametrize("name", JOURNEYS)
def test_a_run_goes_on_at_other_ranks_and_stages_with_the_same_sequences(elastic, name):
    legs = enumerate(JOURNEYS[name])
    seen = [rank for number, leg in legs for rank in elastic.seen(f"{name}.{number}", leg.world)]
    found = global_batches(seen)
    assert found == global_batches(elastic.seen(golden_of(name)))
    assert set(found) == set(range(1, ELASTIC_STEPS + 1))
    epoch = sum((found[step + 1] for step in range(SEQUENCES // BATCH)), Counter())
    assert epoch == Counter(range(SEQUENCES))


def changes(seen: dict[str, Any]) -> list[str]:
    return [line for line in seen["output"].splitlines() if " before, " in line]


@pytest.mark.parametrize("name", JOURNEYS | MIXED_PRECISION)
def test_a_run_that_goes_on_says_what_is_another_than_before(elastic, name):
    legs = (JOURNEYS | MIXED_PRECISION)[name]
    for number, (before, now) in enumerate(pairwise(legs), start=1):
        expected = []
        if before.world != now.world:
            expected.append(f"world size: {before.world} before, {now.world} now")
        if before.stage != now.stage:
            expected.append(f"zero stage: {before.stage} before, {now.stage} now")
        if before.precision != now.precision:
            expected.append(f"precision: {before.precision} before, {now.precision} now")
        assert changes(elastic.seen(f"{name}.{number}", now.world)[0]) == expected


def test_a_smaller_mmd_batch_is_told_and_the_first_step_reconstructs_as_before(elastic):
    (seen,) = elastic.seen(f"{SMALLER_MMD}.1", 1)
    assert changes(seen) == [
        "world size: 2 before, 1 now",
        "mmd batch: 36 before, 18 now",
    ]
    found, golden = elastic.metrics(SMALLER_MMD), elastic.metrics(f"{SMALLER_MMD}.golden")
    assert found[:4] == golden[:4]
    key = "reconstruction"
    assert found[4][key] == pytest.approx(golden[4][key], rel=1e-5)
    assert found[4]["mmd"] != pytest.approx(golden[4]["mmd"], rel=1e-3)
    assert len(found) == ELASTIC_STEPS


@pytest.mark.parametrize("name", MIXED_PRECISION)
def test_a_run_goes_on_in_another_precision(elastic, name):
    found, golden = elastic.metrics(name), elastic.metrics(golden_of(name))
    assert len(found) == ELASTIC_STEPS
    for line, wanted in zip(found, golden, strict=True):
        assert line["reconstruction"] == pytest.approx(wanted["reconstruction"], rel=1e-2)


@pytest.mark.parametrize("bottleneck", INITIAL)
def test_every_stage_starts_from_the_same_weights(elastic, bottleneck):
    """Nothing is learned at a rate of 1e-30."""
    wanted = consolidated_weights(elastic.last(f"{bottleneck} 1"))
    assert all(weight.isfinite().all() for weight in wanted.values())
    for stage in STAGES:
        found = consolidated_weights(elastic.last(f"{bottleneck} {stage}"))
        assert found.keys() == wanted.keys()
        for name, weight in wanted.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-20)
