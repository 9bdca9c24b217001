import errno
import json
import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml

from shards import open_index
from t5vae.checkpoint.retention import list_checkpoints
from t5vae.cluster import run_folder
from t5vae.cluster.run_folder import LOCK, lock_run
from t5vae.common.errors import UserError
from t5vae.config import Config, load_config
from t5vae.training import build, setup

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def index(dataset):
    return open_index(dataset)


def refusal(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_vocabulary_special_ids_and_length_come_from_the_shards(make_config, index):
    made = build.model_config(make_config(), index)
    assert made.sequence_length == index.max_length == 24
    assert made.t5["vocab_size"] == index.vocab_size == 300
    assert made.t5["pad_token_id"] == index.pad_id
    assert made.t5["eos_token_id"] == index.eos_id
    assert made.latent_size == 8


def test_a_larger_vocabulary_and_length_than_the_shards_are_allowed(make_config, index):
    made = build.model_config(make_config(model={"vocab_size": 512, "sequence_length": 40}), index)
    assert made.t5["vocab_size"] == 512
    assert made.sequence_length == 40


@pytest.mark.parametrize(
    ("key", "given", "needed"), [("vocab_size", 299, 300), ("sequence_length", 23, 24)]
)
def test_a_model_too_small_for_the_shards_is_refused_with_both_values(
    make_config, index, key, given, needed
):
    message = refusal(build.model_config, make_config(model={key: given}), index)
    for word in (f"model.{key}", str(given), str(needed), str(index.path)):
        assert word in message


def test_equal_seeds_give_equal_weights(make_config, index):
    def weights(seed):
        run = {"name": "small", "seed": seed}
        model = build.build_model(make_config(run=run), index, torch.device("cpu"))
        return {name: value.tolist() for name, value in model.state_dict().items()}

    assert weights(1) == weights(1)
    assert weights(1) != weights(2)


# Parameters of the T5 inside, tied embeddings of 32,128 pieces: t5-base 222.9 M; a 24-layer T5 of
# d_ff 16,384 with 32 heads of 128 (t5-3b) 2,851.6 M.
@pytest.mark.parametrize(
    ("name", "parameters"), [("legacy", 222.9e6), ("python_lines", 222.9e6), ("large", 2851.6e6)]
)
def test_a_preset_has_the_size_of_the_t5_it_names(name, parameters):
    facts = setup.describe(load_config(CONFIGS / f"{name}.yaml"), None, 64)
    assert parameters < facts["parameters"] < 1.05 * parameters


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_built_on_the_meta_device_at_its_own_world_size(path, index):
    config = load_config(path)
    world_size = config.launcher.nodes * max(1, config.launcher.gpus_per_node)
    sized = config.model.vocab_size and config.model.sequence_length
    facts = setup.describe(config, None if sized else index, world_size)
    assert facts["micro_batch_size"] * facts["accumulation"] * world_size == (
        config.data.global_batch_size
    )
    assert facts["parameters"] > 500_000
    assert facts["state_bytes_per_rank"] > 0


def test_what_depends_on_the_data_is_told_where_there_is_some(make_config, index):
    config = make_config(train={"steps": 100})
    facts = setup.describe(config, index, 2)
    sequences = index.sequences("train")
    assert facts["train_sequences"] == sequences
    assert facts["steps_per_epoch"] == pytest.approx(sequences / 16, abs=0.01)
    assert facts["epochs"] == pytest.approx(1600 / sequences, abs=0.01)
    assert facts["micro_batch_size"] == 8


def test_shards_that_are_missing_are_needed_only_for_what_is_not_set(make_config, tmp_path):
    data = {"shards": str(tmp_path / "none"), "global_batch_size": 16}
    sized = make_config(data=data, model={"vocab_size": 300, "sequence_length": 24})
    assert "epochs" not in setup.describe_config(sized, 2)
    message = refusal(setup.describe_config, make_config(data=data), 2)
    assert "t5vae shards build" in message


def test_a_run_that_fits_is_checked_and_its_index_returned(make_config, dataset):
    assert setup.check_before_start(make_config(), 2).path == str(dataset)


def test_a_batch_that_ranks_cannot_share_is_refused_before_the_start(make_config):
    message = refusal(setup.check_before_start, make_config(), 3)
    assert "16" in message
    assert "3 ranks" in message


def test_a_micro_step_of_one_sequence_is_refused_under_the_unbiased_mmd(make_config, dataset):
    data = {"shards": str(dataset), "global_batch_size": 16, "micro_batch_size": 1}
    refusal(setup.check_before_start, make_config(data=data), 1)
    setup.check_before_start(make_config(data=data), 2)
    setup.check_before_start(make_config(data=data, objective={"mmd": {"estimator": "v"}}), 1)


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
    assert "CUDA device" in refusal(setup.check_before_start, make_config(**sections), 1)


def test_a_full_disk_is_refused_before_the_start(make_config, monkeypatch, tmp_path):
    asked = []
    usage = namedtuple("usage", "total used free")

    def nearly_full(path):
        asked.append(Path(path))
        return usage(10**9, 10**9 - 1000, 1000)

    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    message = refusal(setup.check_before_start, make_config(), 1)
    assert "free" in message
    assert str(tmp_path) in message
    assert asked == [tmp_path]  # the nearest folder that exists already


def test_a_run_folder_is_made_and_locked(make_config):
    config = make_config()
    with lock_run(config.run_dir):
        assert (config.run_dir / "checkpoints").is_dir()
        message = refusal(lock_run, config.run_dir)
        assert str(config.run_dir) in message
    lock_run(config.run_dir).close()


def test_a_lock_dies_with_its_process(make_config):
    config = make_config()
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        lock = lock_run(config.run_dir)
        os.write(tell, b"held")
        signal.pause()
        lock.close()
    os.close(tell)
    try:
        assert os.read(ready, 4) == b"held"
        assert "another process" in refusal(lock_run, config.run_dir)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
    lock_run(config.run_dir).close()


def test_a_run_folder_that_cannot_be_made_is_refused(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        run = {"name": "small", "output_dir": str(path)}
        assert str(path) in refusal(lock_run, make_config(run=run).run_dir)


def test_resume_never_refuses_a_folder_with_checkpoints(make_config, save):
    config = make_config(checkpoint={"resume": "never"})
    lock_run(config.run_dir).close()
    save(config.run_dir / "checkpoints", 10)
    assert "never" in refusal(lambda folder: lock_run(folder, anew=True), config.run_dir)
    lock_run(make_config().run_dir).close()


def test_a_run_is_finished_when_its_newest_checkpoint_has_all_steps(make_config, index, save):
    config = make_config(train={"steps": 30})
    identity = setup.identity(config, index)
    assert not setup.is_finished(config, identity)
    for step, finished in ((10, False), (30, True)):
        save(config.run_dir / "checkpoints", step, identity)
        assert setup.is_finished(config, identity) is finished
    assert not setup.is_finished(make_config(train={"steps": 31}), identity)


def test_garbage_in_place_of_the_newest_manifest_hides_no_earlier_one(make_config, index, save):
    config = make_config(train={"steps": 20})
    identity = setup.identity(config, index)
    for step in (10, 20):
        save(config.run_dir / "checkpoints", step, identity)
    newest = list_checkpoints(config.run_dir / "checkpoints")[-1]
    (newest / "manifest.json").write_text("{}")
    assert not setup.is_finished(config, identity)


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
    make_config, index, save, sections, words
):
    config = make_config()
    save(config.run_dir / "checkpoints", 10, setup.identity(config, index))
    tree = config.model_dump()
    for section, values in sections.items():
        for key, value in values.items():
            nested = isinstance(value, dict)
            tree[section][key] = {**tree[section][key], **value} if nested else value
    other = Config(**tree)
    message = refusal(setup.is_finished, other, setup.identity(other, index))
    for word in words:
        assert word in message


def test_ranks_zero_stage_and_precision_make_no_other_run(make_config, index, save):
    config = make_config()
    save(config.run_dir / "checkpoints", 10, setup.identity(config, index))
    other = make_config(
        deepspeed={"zero_stage": 3, "offload_optimizer": True},
        train={"steps": 10, "precision": "fp32"},
        data={"shards": config.data.shards, "global_batch_size": 16, "micro_batch_size": 2},
    )
    assert setup.is_finished(other, setup.identity(other, index))


def test_the_layout_before_is_that_of_the_run_that_is_gone_on_with(make_config, save):
    config = make_config()
    assert setup.layout_before(config) == {}
    save(config.run_dir / "checkpoints", 10)
    assert setup.layout_before(config)["precision"] == "fp32"
    anew = make_config(checkpoint={"resume": "weights"})
    assert setup.layout_before(anew) == {}
    save(config.run_dir / "checkpoints", 20, weights_from="another run")
    assert setup.layout_before(anew)["precision"] == "fp32"


def test_the_layout_is_what_may_differ(make_config, dataset):
    assert setup.layout(make_config(), 4) == {
        "world_size": 4,
        "mmd_batch": 16,
        "zero_stage": 1,
        "precision": "bf16",
        "muon_precision": None,
    }
    data = {"shards": str(dataset), "global_batch_size": 16, "micro_batch_size": 2}
    other = make_config(data=data, deepspeed={"zero_stage": 0}, train={"precision": "fp32"})
    assert setup.layout(other, 2) == {
        "world_size": 2,
        "mmd_batch": 4,
        "zero_stage": 0,
        "precision": "fp32",
        "muon_precision": None,
    }


def test_a_new_run_from_weights_is_not_finished_by_the_run_that_is_there(make_config, index, save):
    config = make_config(checkpoint={"resume": "weights"})
    identity = setup.identity(config, index)
    save(config.run_dir / "checkpoints", 10, {**identity, "seed": 7})
    assert not setup.is_finished(config, identity)
    save(config.run_dir / "checkpoints", 10, identity, weights_from="there")
    assert setup.is_finished(config, identity)
    save(config.run_dir / "checkpoints", 10, {**identity, "seed": 7}, weights_from="there")
    assert "seed" in refusal(setup.is_finished, config, identity)


def test_other_shards_are_refused_with_both_fingerprints(make_config, index, other_dataset, save):
    config = make_config()
    save(config.run_dir / "checkpoints", 10, setup.identity(config, index))
    other = open_index(other_dataset)
    message = refusal(setup.is_finished, config, setup.identity(config, other))
    assert "shards" in message
    assert index.sha256 in message
    assert other.sha256 in message


def test_another_release_of_transformers_does_not_forbid_to_resume(make_config, index, monkeypatch):
    config = make_config()
    before = setup.identity(config, index)
    monkeypatch.setattr("transformers.__version__", "99.0")
    monkeypatch.setattr("transformers.configuration_utils.__version__", "99.0")
    assert setup.identity(config, index) == before


def test_the_resolved_configuration_is_saved_and_loads_as_the_same(make_config):
    config = make_config()
    config.run_dir.mkdir()
    config.write()
    path = config.run_dir / "config.yaml"
    assert load_config(path) == config
    assert yaml.safe_load(path.read_text())["optim"]["lr"] == config.optim.lr
    assert list(config.run_dir.iterdir()) == [path]


def hold(config, **holder):
    """Leave a lock that nobody has, as a file system without locks shows it."""
    (config.run_dir / "checkpoints").mkdir(parents=True)
    (config.run_dir / LOCK).write_text(json.dumps({"host": "node3", **holder}))


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Sets what SLURM says of the job that it is asked for."""
    command = tmp_path / "bin" / "squeue"
    command.parent.mkdir()
    monkeypatch.setenv("PATH", str(command.parent), prepend=":")

    def says(text):
        command.write_text(f"#!/bin/sh\necho '{text}'\n")
        command.chmod(0o755)

    return says


def test_the_lock_says_who_holds_it(make_config, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURMD_NODENAME", "node3")
    config = make_config()
    with lock_run(config.run_dir):
        assert "(job 77 on node3)" in refusal(lock_run, config.run_dir)


def test_a_run_that_another_job_trains_is_refused_even_where_files_have_no_locks(
    make_config, squeue, monkeypatch
):
    def unlockable(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_folder.fcntl, "flock", unlockable)
    config = make_config()
    hold(config, job="77")
    squeue("77 RUNNING")
    assert "(job 77 on node3)" in refusal(lock_run, config.run_dir)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    lock_run(config.run_dir).close()


def test_a_lock_of_a_job_that_ended_is_taken(make_config, squeue):
    config = make_config()
    hold(config, job="77")
    squeue("")
    lock_run(config.run_dir).close()


@pytest.mark.parametrize("text", ["", "{", "0123abcd", "[1]", "{}"])
def test_a_lock_with_any_content_can_be_taken(make_config, text):
    config = make_config()
    hold(config)
    (config.run_dir / LOCK).write_text(text)
    lock_run(config.run_dir).close()
