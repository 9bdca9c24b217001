"""`t5vae checkpoints` and `t5vae export`, on a real run of one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel

import t5vae.model  # noqa: F401 (registers T5VAE with transformers)
from t5vae import cli
from t5vae.checkpoint import retention
from t5vae.checkpoint.manifest import consolidated_weights

pytestmark = pytest.mark.distributed

TRAIN = Path(__file__).parents[2] / "train.py"
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> Path:
    """A run of 8 steps with checkpoints of 2, 4, 6 and 8, and a held-out loss of each."""
    folder = tmp_path_factory.mktemp("trained")
    config = folder / "small.yaml"
    sections = {
        "run": {"output_dir": str(folder / "run")},
        "data": {"shards": str(dataset), "global_batch_size": 16},
        "model": {"t5": T5, "latent_size": 8, "token_size": 4},
        "train": {"steps": 8, "precision": "fp32"},
        "checkpoint": {"every": 2, "keep_last": 4},
        "eval": {"every": 2, "sequences": 20},
    }
    config.write_text(yaml.safe_dump(sections))
    ranks = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "SLURM_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ranks)}
    done = subprocess.run(
        [sys.executable, TRAIN, config], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `t5vae ...` in this process; its exit code and what it printed."""

    def start(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["t5vae", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return start


def listed(command, run, *options) -> list[dict]:
    return json.loads(command("checkpoints", run, "--json", *options)[1])["checkpoints"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_checkpoints_are_listed_with_what_they_are(trained, command):
    found = listed(command, trained)
    assert [entry["step"] for entry in found] == [2, 4, 6, 8]
    for entry in found:
        assert entry["name"] == f"step-{entry['step']:08d}"
        assert (entry["world_size"], entry["zero_stage"], entry["precision"]) == (1, 1, "fp32")
        assert entry["problem"] is None
        assert entry["held_out"] > 0
        folder = trained / "checkpoints" / entry["name"]
        assert entry["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    code, out, _ = command("checkpoints", trained, "--verify")
    assert code == 0
    for word in ("step-00000002", "step-00000008", "fp32", "whole"):
        assert word in out


def test_an_unfinished_run_is_exported_but_not_as_a_finished_one(run, command):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("steps: 8", "steps: 1000"))
    code, _, err = command("export", run, "--finished")
    assert code == 2
    assert f"{run} is at step 8 of 1,000: the command that trained it goes on" in err
    assert not (run / "export").exists()
    assert command("export", run)[0] == 0
    assert command("export", run, "--finished")[0] == 2
    config.write_text(config.read_text().replace("steps: 1000", "steps: 8"))
    code, out, _ = command("export", run, "--finished")
    assert code == 0
    assert "already exported" in out


def test_damage_is_named_and_exits_with_1_when_all_is_verified(run, command):
    (run / "checkpoints/step-00000010.tmp").mkdir()  # a save that goes on
    assert command("checkpoints", run, "--verify")[0] == 0
    flip(run / "checkpoints/step-00000004/rank-00000.safetensors")
    assert command("checkpoints", run)[0] == 0
    assert listed(command, run)[1]["problem"] is None
    code, out, _ = command("checkpoints", run, "--verify", "--json")
    assert code == 1
    problems = {e["name"]: e["problem"] for e in json.loads(out)["checkpoints"] if e["problem"]}
    assert problems == {
        "step-00000004": "rank-00000.safetensors has changed",
        "step-00000010.tmp": "unfinished",
    }


def test_one_checkpoint_is_removed_by_its_step_or_its_name(run, command):
    retention.set_aside(run / "checkpoints/step-00000006")
    gone = ["--remove", "2", "--remove", "step-00000006.damaged-0"]
    assert [entry["name"] for entry in listed(command, run, *gone)] == [
        "step-00000004",
        "step-00000008",
    ]


@pytest.mark.parametrize("name", ["7", "step-00000007", "..", ".", "", "step-00000002/.."])
def test_what_is_not_there_is_not_removed(run, command, name):
    code, _, err = command("checkpoints", run, "--remove", name)
    assert code == 2
    assert err.startswith("error: there is no checkpoint")
    assert "step-00000002" in err
    assert len(listed(command, run)) == 4


def test_the_checkpoint_that_the_run_would_go_on_from_is_never_removed(run, command):
    code, _, err = command("checkpoints", run, "--remove", "8")
    assert code == 2
    assert "newest whole checkpoint" in err
    flip(run / "checkpoints/step-00000008/rank-00000.safetensors")
    code, _, err = command("checkpoints", run, "--remove", "6")
    assert code == 2
    assert "step-00000006" in err
    assert command("checkpoints", run, "--remove", "8")[0] == 0
    assert [entry["step"] for entry in listed(command, run)] == [2, 4, 6]


def test_a_folder_that_is_no_run_is_refused(tmp_path, command):
    code, _, err = command("checkpoints", tmp_path)
    assert code == 2
    assert "not a run folder" in err


def test_a_step_is_exported_as_it_was(run, command):
    assert "step-00000008" in command("export", run)[1]
    newest = load_file(run / "export/model.safetensors")
    assert "step-00000004" in command("export", run, "--step", 4)[1]
    exported = load_file(run / "export/model.safetensors")
    saved = consolidated_weights(run / "checkpoints/step-00000004")
    assert exported.keys() == newest.keys()
    for name, weight in saved.items():
        assert torch.equal(exported[name].flatten(), weight), name
    assert any(not torch.equal(exported[name], newest[name]) for name in exported)
    assert "already exported" in command("export", run, "--step", 4)[1]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_are_exported_in_the_type_asked_for(run, command, dtype):
    assert "already" not in command("export", run)[1]
    assert "already" not in command("export", run, "--dtype", dtype)[1]
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    exported = load_file(run / "export/model.safetensors")
    assert {weight.dtype for weight in exported.values()} == {wanted}
    model = AutoModel.from_pretrained(run / "export")
    saved = consolidated_weights(run / "checkpoints/step-00000008")
    for name, weight in model.named_parameters():
        assert torch.equal(weight.flatten(), saved[name].to(wanted)), name


def test_a_step_or_type_that_is_not_there_is_refused(run, command):
    code, _, err = command("export", run, "--step", 5)
    assert code == 2
    assert "2, 4, 6, 8" in err
    code, _, err = command("export", run, "--dtype", "int8")
    assert code == 2
    assert "fp32, bf16, fp16" in err
    assert not (run / "export").exists()


def test_a_damaged_step_is_set_aside_and_not_exported(run, command):
    flip(run / "checkpoints/step-00000004/rank-00000.safetensors")
    code, _, err = command("export", run, "--step", 4)
    assert code == 2
    assert "no valid checkpoint of step 4; there are: 2, 6, 8" in err
    assert (run / "checkpoints/step-00000004.damaged-0").is_dir()
