"""What earlier versions wrote, read by today's code: tests/fixtures, a folder for each version."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from submitit.core.utils import DelayedSubmission
from transformers import AutoModel, AutoTokenizer

import shards
from launcher.task import Training
from t5vae.latent import LatentSpace

ROOT = Path(__file__).parents[1]
VERSIONS = sorted((ROOT / "tests/fixtures").glob("v*"))
FIGURES = ("loss", "reconstruction", "mmd")


@pytest.fixture(params=VERSIONS, ids=lambda folder: folder.name)
def wrote(request, tmp_path, monkeypatch) -> Path:
    """A copy of what a version wrote, as the current folder: its paths are relative."""
    folder = tmp_path / request.param.name
    shutil.copytree(request.param, folder)
    monkeypatch.chdir(folder)
    return folder


def start(*arguments: Any, **environment: str) -> str:
    """Run a program on one CPU, which must end well; returns its output."""
    launchers = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "SLURM_", "CROSS_", "SUBMITIT_")
    inherited = {name: v for name, v in os.environ.items() if not name.startswith(launchers)}
    fixed = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    fixed["PYTHONPATH"] = str(ROOT)  # the fixture has a folder `shards` of its own
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**inherited, **fixed, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def metrics() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]


def check_same_steps(before: list[dict[str, Any]]) -> None:
    """The checkpoint's steps and those after it have the figures that they had."""
    after = metrics()
    assert [line["step"] for line in after] == [line["step"] for line in before]
    assert after[-1]["consumed"] == before[-1]["consumed"]
    assert after[-1]["time"] > before[-1]["time"]
    for name in FIGURES:
        expected = [line[name] for line in before]
        assert [line[name] for line in after] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_there_are_fixtures():
    assert VERSIONS


def test_its_shards_are_whole_and_stream(wrote):
    assert shards.verify("shards").problems == []
    index = shards.open_index("shards")
    assert all(index.sequences(split) > 100 for split in ("train", "valid"))
    stream = shards.ShardStream("shards", seed=0, global_batch_size=16)
    first = next(iter(stream))
    state = stream.state_dict()
    text = shards.load_tokenizer("shards/tokenizer").decode(first.ids[0], skip_special_tokens=True)
    assert text.isprintable()
    assert text
    going_on = shards.ShardStream("shards", seed=0, global_batch_size=16)
    going_on.load_state_dict(state)
    assert torch.equal(next(iter(going_on)).ids, next(iter(stream)).ids)


@pytest.mark.distributed
def test_its_run_goes_on_as_it_did(wrote):
    before = metrics()
    out = start(ROOT / "train.py", "run/config.yaml")
    assert "resuming" in out
    check_same_steps(before)


def test_its_checkpoint_is_exported_as_it_was(wrote, t5vae):
    old = AutoModel.from_pretrained("run/export").state_dict()
    assert "already exported" in t5vae("export", "run")[1]
    shutil.rmtree("run/export")
    assert t5vae("export", "run")[0] == 0
    new = AutoModel.from_pretrained("run/export").state_dict()
    assert new.keys() == old.keys()
    for name, weight in new.items():
        assert torch.equal(weight, old[name]), name


def test_its_export_is_a_model_and_a_space(wrote):
    model = AutoModel.from_pretrained("run/export")
    texts = Path("lines.txt").read_text().splitlines()
    tokenizer = AutoTokenizer.from_pretrained("run/export")
    ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids
    with torch.no_grad():
        z_ND = model(input_ids=ids, mode="encode")
    for place in ("run", "run/export"):
        space = LatentSpace.load(place)
        torch.testing.assert_close(space.encode(texts), z_ND)
        assert len(space.decode(z_ND)) == len(texts)
    torch.testing.assert_close(torch.from_numpy(np.load("codes/codes.npy")), z_ND)


@pytest.mark.slow
def test_its_evaluation_is_known_and_comes_out_the_same(wrote, t5vae):
    old = json.loads(Path("run/eval.json").read_text())
    assert t5vae("compare", "run")[0] == 0
    code, out, _ = t5vae("eval", "run", "--json")  # anew: the old one tells less
    assert code == 0
    assert "already evaluated" in t5vae("eval", "run")[1]
    new = json.loads(out)
    assert new.keys() >= old.keys()
    for name in ("exact_match", "nats_per_token", "valid", "mmd", "participation_ratio"):
        assert new[name] == pytest.approx(old[name], rel=1e-3, abs=1e-5), name
    assert new["controls"]["trigram"] == pytest.approx(old["controls"]["trigram"])


def test_its_codes_are_searched_and_decoded(wrote, t5vae):
    text = Path("lines.txt").read_text().splitlines()[0]
    code, out, _ = t5vae("nearest", "run", text, "-n", 1, "--corpus", "codes", "--json")
    assert code == 0
    (nearest,) = json.loads(out)["texts"][0]["nearest"]
    assert nearest["text"] == text
    assert nearest["distance"] == pytest.approx(0, abs=1e-3)
    code, out, _ = t5vae("decode", "run", "codes", "--json")
    assert code == 0
    assert len(json.loads(out)["texts"]) == len(np.load("codes/codes.npy"))


@pytest.mark.distributed
def test_its_queued_job_is_queued_again_and_trains(wrote):
    (pickle,) = Path("job").glob("*_submitted.pkl")
    delayed = DelayedSubmission.load(pickle)
    assert type(delayed.function) is Training
    again = delayed._checkpoint_function()  # what submitit does when the job's time is over
    again.set_timeout(delayed._timeout_min, delayed._timeout_countdown)
    again.dump(pickle)
    loaded = DelayedSubmission.load(pickle)
    assert type(loaded.function) is Training
    assert loaded.function.config == delayed.function.config

    before = metrics()
    job = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": pickle.name.partition("_")[0]}
    out = start("-m", "submitit.core._submit", "job", **job)
    assert "resuming" in out
    check_same_steps(before)
