"""What follows from a run's configuration, and what is refused before it starts."""

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml

from shards import open_index
from t5vae.checkpoint import manifest
from t5vae.checkpoint.retention import list_checkpoints
from t5vae.cluster.ranks import Ranks
from t5vae.config import Config, load_config
from t5vae.training.job import Job, manifest_before, resolve
from tests.refused import refusal


def job_of(config: Config, world_size: int = 1) -> Job:
    return resolve(config, Ranks(0, world_size, 0, world_size, "127.0.0.1", 0))


def test_a_run_that_fits_is_resolved(make_config, dataset):
    job = job_of(make_config(), 2)
    assert job.dataset.path == str(dataset)
    assert (job.split.micro, job.split.accumulation) == (8, 1)
    assert job.settings.sequence_length == 24
    assert job.deepspeed["train_micro_batch_size_per_gpu"] == 8
    sequences = open_index(dataset).sequences("train")
    assert job.summary == (
        f"{job.parameters:,} parameters, 2 ranks, {sequences:,} sequences, "
        f"{round(160 / sequences, 2)} epochs in 10 steps"
    )


def test_a_batch_that_ranks_cannot_share_is_refused_before_the_start(make_config):
    message = refusal(job_of, make_config(), 3)
    assert "16" in message
    assert "3 ranks" in message


def test_a_micro_step_of_one_sequence_is_refused_under_the_unbiased_mmd(make_config, dataset):
    data = {"shards": str(dataset), "global_batch_size": 16, "micro_batch_size": 1}
    refusal(job_of, make_config(data=data), 1)
    job_of(make_config(data=data), 2)
    job_of(make_config(data=data, objective={"mmd": {"estimator": "v"}}), 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device has it")
@pytest.mark.parametrize(
    "sections",
    [
        {"objective": {"mmd": {"implementation": "triton"}}},
        {"model": {"fused_cross_entropy": True}},
    ],
    ids=["triton", "liger"],
)
def test_a_kernel_for_cuda_is_refused_where_there_is_no_cuda_device(make_config, sections):
    assert "CUDA device" in refusal(job_of, make_config(**sections), 1)


def test_a_full_disk_is_refused_before_the_start(make_config, monkeypatch, tmp_path):
    asked = []
    usage = namedtuple("usage", "total used free")

    def nearly_full(path):
        asked.append(Path(path))
        return usage(10**9, 10**9 - 1000, 1000)

    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    message = refusal(job_of, make_config(), 1)
    assert "free" in message
    assert str(tmp_path) in message
    assert asked == [tmp_path]  # the nearest folder that exists already


@pytest.mark.parametrize(
    ("saves", "looks", "saved", "evaluated", "logged"),
    [
        (0, 0, [10], [], [4, 8, 10]),
        (4, 0, [4, 8, 10], [], [4, 8, 10]),
        (5, 3, [5, 10], [3, 5, 6, 9, 10], [4, 8, 10]),
        (0, 20, [10], [10], [4, 8, 10]),
    ],
)
def test_evaluations_precede_every_checkpoint_and_the_last_step_has_all(
    make_config, saves, looks, saved, evaluated, logged
):
    job = job_of(make_config(checkpoint={"every": saves}, eval={"every": looks}, log={"every": 4}))
    steps = range(1, 11)
    assert [step for step in steps if job.saves_after(step)] == saved
    assert [step for step in steps if job.evaluates_after(step)] == evaluated
    assert [step for step in steps if job.logs_after(step)] == logged


def test_a_batch_is_shown_again_by_a_command_with_the_whole_mixture(
    make_config, dataset, damaged_dataset
):
    seed = {"name": "small", "seed": 3}
    assert job_of(make_config(run=seed)).replay(32, 3) == (
        f"t5vae shards inspect {dataset} --position=32 --batch=16 --seed=3 --order-version=3"
    )
    mixture = [{"path": str(dataset), "weight": 3}, str(damaged_dataset)]
    config = make_config(data={"shards": mixture, "global_batch_size": 16})
    assert job_of(config).replay(0, 2) == (
        f"t5vae shards inspect {dataset} {damaged_dataset} --weight=3.0 --weight=1.0 "
        "--position=0 --batch=16 --seed=0 --order-version=2"
    )


def test_a_run_is_finished_when_its_newest_checkpoint_has_all_steps(make_config, save):
    job = job_of(make_config(train={"steps": 30}))
    assert not job.is_finished()
    for step, finished in ((10, False), (30, True)):
        save(job.folder / "checkpoints", step, job.identity)
        assert job.is_finished() is finished
    assert not job_of(make_config(train={"steps": 31})).is_finished()


def test_whether_a_run_is_finished_is_told_without_reading_what_ranks_saved(
    make_config, save, monkeypatch
):
    job = job_of(make_config(train={"steps": 10}))
    saved = save(job.folder / "checkpoints", 10, job.identity, world=2)
    monkeypatch.setattr(manifest, "_sha256", None)  # what reads a file
    assert job.is_finished()
    path = saved / "rank-00001.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    assert not job.is_finished()


def test_garbage_in_place_of_the_newest_manifest_hides_no_earlier_one(make_config, save):
    job = job_of(make_config(train={"steps": 20}))
    for step in (10, 20):
        save(job.folder / "checkpoints", step, job.identity)
    newest = list_checkpoints(job.folder / "checkpoints")[-1]
    (newest / "manifest.json").write_text("{}")
    assert not job.is_finished()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"run": {"seed": 5}}, ["seed", "0", "5"]),
        ({"optim": {"name": "adamw"}}, ["optimizer", "muon", "adamw"]),
        ({"data": {"global_batch_size": 32}}, ["global batch size", "16", "32"]),
        ({"model": {"t5": {"d_ff": 64}}}, ["d_ff", "32", "64"]),
        ({"model": {"latent_size": 12}}, ["latent_size", "8", "12"]),
        ({"model": {"bottleneck": "attention"}}, ["bottleneck", "flatten", "attention"]),
    ],
)
def test_a_run_folder_of_another_run_is_refused_with_both_values(
    make_config, save, sections, words
):
    job = job_of(make_config())
    save(job.folder / "checkpoints", 10, job.identity)
    tree = job.config.model_dump()
    for section, values in sections.items():
        for key, value in values.items():
            nested = isinstance(value, dict)
            tree[section][key] = {**tree[section][key], **value} if nested else value
    message = refusal(job_of(Config(**tree)).is_finished)
    for word in words:
        assert word in message


def test_ranks_zero_stage_and_precision_make_no_other_run(make_config, save):
    job = job_of(make_config())
    save(job.folder / "checkpoints", 10, job.identity)
    other = make_config(
        deepspeed={"zero_stage": 3, "offload_optimizer": True},
        train={"steps": 10, "precision": "fp32"},
        data={"shards": job.config.data.shards, "global_batch_size": 16, "micro_batch_size": 2},
    )
    assert job_of(other, 2).is_finished()


def test_the_layout_before_is_that_of_the_run_that_is_gone_on_with(make_config, save):
    config = make_config()
    assert manifest_before(config) is None
    save(config.run_dir / "checkpoints", 10)
    assert manifest_before(config)["layout"]["precision"] == "fp32"
    anew = make_config(checkpoint={"resume": "weights"})
    assert manifest_before(anew) is None
    save(config.run_dir / "checkpoints", 20, weights_from="another run")
    assert manifest_before(anew)["layout"]["precision"] == "fp32"


def test_the_layout_is_what_may_differ(make_config, dataset):
    assert job_of(make_config(), 4).layout == {
        "world_size": 4,
        "mmd_batch": 16,
        "zero_stage": 1,
        "precision": "bf16",
        "muon_precision": None,
        "tiles": {},
    }
    data = {"shards": str(dataset), "global_batch_size": 16, "micro_batch_size": 2}
    other = make_config(data=data, deepspeed={"zero_stage": 0}, train={"precision": "fp32"})
    assert job_of(other, 2).layout == {
        "world_size": 2,
        "mmd_batch": 4,
        "zero_stage": 0,
        "precision": "fp32",
        "muon_precision": None,
        "tiles": {},
    }


def test_a_new_run_from_weights_is_not_finished_by_the_run_that_is_there(make_config, save):
    job = job_of(make_config(checkpoint={"resume": "weights"}))
    checkpoints = job.folder / "checkpoints"
    save(checkpoints, 10, {**job.identity, "seed": 7})
    assert not job.is_finished()
    save(checkpoints, 10, job.identity, weights_from="there")
    assert job.is_finished()
    save(checkpoints, 10, {**job.identity, "seed": 7}, weights_from="there")
    assert "seed" in refusal(job.is_finished)


def test_other_shards_are_refused_with_both_fingerprints(make_config, dataset, other_dataset, save):
    job = job_of(make_config())
    save(job.folder / "checkpoints", 10, job.identity)
    data = {"shards": str(other_dataset), "global_batch_size": 16}
    message = refusal(job_of(make_config(data=data)).is_finished)
    assert "shards" in message
    assert open_index(dataset).sha256 in message
    assert open_index(other_dataset).sha256 in message


def test_another_release_of_transformers_does_not_forbid_to_resume(make_config, monkeypatch):
    before = job_of(make_config()).identity
    monkeypatch.setattr("transformers.__version__", "99.0")
    monkeypatch.setattr("transformers.configuration_utils.__version__", "99.0")
    assert job_of(make_config()).identity == before


def test_the_resolved_configuration_is_saved_and_loads_as_the_same(make_config):
    config = make_config()
    config.run_dir.mkdir()
    config.write()
    path = config.run_dir / "config.yaml"
    assert load_config(path) == config
    assert yaml.safe_load(path.read_text())["optim"]["lr"] == config.optim.lr
    assert list(config.run_dir.iterdir()) == [path]
