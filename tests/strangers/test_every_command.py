"""One evil thing of each kind, and every command that opens it: none is fooled by any."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.main import get_command

from launcher.cli import app as of_launcher
from t5vae.checkpoint.manifest import MANIFEST, read_manifest, seal
from t5vae.cli import app as of_t5vae
from tests.launching import environment
from tests.strangers.conftest import Handed

MARK = "import os; os.mkdir('marked')\n"
BUILT = ("--max-length", "16", "--tokenizer", "shards/tokenizer", "--workers", "1")
OF_T5VAE = {
    "eval": ["eval", "run", "--sequences", "4", "--samples", "2"],
    "eval elsewhere": ["eval", "run/export", "--shards", "shards", "--samples", "2"],
    "checkpoints": ["checkpoints", "run", "--verify"],
    "compare": ["compare", "run"],
    "plot": ["plot", "run"],
    "runs": ["runs", "."],
    "track": ["track", "run", "--tensorboard"],
    "config show": ["config", "show", "run/config.yaml"],
    "plan": ["plan", "run/config.yaml"],
    "shards inspect": ["shards", "inspect", "shards"],
    "shards inspect position": ["shards", "inspect", "shards", "--position", "0"],
    "shards verify": ["shards", "verify", "shards"],
    "shards build": ["shards", "build", "lines.txt", "--out", "new", *BUILT],
    "encode": ["encode", "run", "--file", "lines.txt", "--out", "encoded"],
    "decode": ["decode", "run", "codes"],
    "reconstruct": ["reconstruct", "run", "x = 1"],
    "interpolate": ["interpolate", "run", "x = 1", "y = 2"],
    "grid": ["grid", "run", "x = 1", "y = 2", "z = 3", "w = 4"],
    "sample": ["sample", "run", "-n", "2", "--prior", "gaussian"],
    "neighbors": ["neighbors", "run", "x = 1"],
    "nearest": ["nearest", "run", "x = 1"],
    "nearest of codes": ["nearest", "run", "x = 1", "--corpus", "codes"],
    "fit-property": ["fit-property", "run", "length"],
    "optimize": ["optimize", "run", "x = 1", "--property", "length"],
    "outliers": ["outliers", "run", "--file", "lines.txt"],
    "direction": ["direction", "run", "x = 3", "--pairs", "pairs.tsv"],
    "dedupe": ["dedupe", "run", "--file", "lines.txt"],
    "export": ["export", "run", "--dtype", "bf16"],  # of other codes from now on
}
OF_LAUNCHER = {
    "status": ["status", "run"],
    "logs": ["logs", "run"],
    "cancel": ["cancel", "run"],
    "resume": ["resume", "run", "--cluster", "local", "--dry-run"],
    "submit": ["submit", "run/config.yaml", "--cluster", "local", "--dry-run"],
    "script": ["script", "run/config.yaml"],
}


class Payload:
    def __reduce__(self):
        return os.mkdir, ("marked",)


def change(file: Path, **settings) -> None:
    tree = json.loads(file.read_text())
    file.write_text(json.dumps(tree | settings))


def run_names_code(handed: Handed) -> None:
    file = handed.run / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    tree["eval"]["check"] = "evil:check"
    tree["launcher"]["setup"] = ["touch marked"]
    (handed.folder / "evil.py").write_text(MARK)
    file.write_text(yaml.safe_dump(tree))


def run_links_out(handed: Handed) -> None:
    outside = handed.secret.parent / "outside"
    outside.mkdir()
    for name in ("latent", "logs", "tensorboard"):
        (handed.run / name).symlink_to(outside)


def run_has_a_strange_job(handed: Handed) -> None:
    (handed.run / "jobs").mkdir()
    record = {"id": "1", "cluster": "local", "logs": "/etc", "time": "2026-01-01T00:00:00+00:00"}
    (handed.run / "jobs/1.json").write_text(json.dumps(record) + "\n")
    (handed.run / "jobs/1_0_result.pkl").write_bytes(pickle.dumps(Payload()))


def export_is_a_pickle(handed: Handed) -> None:
    (handed.run / "export/model.safetensors").unlink()
    (handed.run / "export/pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


def export_is_deep(handed: Handed) -> None:
    file = handed.run / "export/config.json"
    tree = json.loads(file.read_text())
    tree["t5"]["num_layers"] = 2**40
    file.write_text(json.dumps(tree))


def tokenizers_have_code(handed: Handed) -> None:
    for folder in (handed.shards / "tokenizer", handed.run / "export"):
        (folder / "evil.py").write_text(MARK)
        auto = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        change(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map=auto)


def index_leads_out(handed: Handed) -> None:
    tree = json.loads((handed.shards / "index.json").read_text())
    tree["shards"][0]["name"] = "../../secret"
    (handed.shards / "index.json").write_text(json.dumps(tree))


def blocks_are_a_pickle(handed: Handed) -> None:
    np.save(handed.shards / "blocks.npy", np.array([Payload()], object), allow_pickle=True)


def checkpoint_leads_out(handed: Handed) -> None:
    (folder,) = (handed.run / "checkpoints").iterdir()
    manifest = read_manifest(folder)
    manifest["files"]["../../../../secret"] = {"bytes": 11, "sha256": "0" * 64}
    (folder / MANIFEST).write_bytes(seal(manifest))


def codes_are_a_pickle(handed: Handed) -> None:
    np.save(handed.codes / "codes.npy", np.array([Payload()], object), allow_pickle=True)
    latent = handed.run / "latent/train"
    shutil.copytree(handed.codes, latent)


EVIL = {
    function.__name__.replace("_", " "): function
    for function in (
        run_names_code,
        run_links_out,
        run_has_a_strange_job,
        export_is_a_pickle,
        export_is_deep,
        tokenizers_have_code,
        index_leads_out,
        blocks_are_a_pickle,
        checkpoint_leads_out,
        codes_are_a_pickle,
    )
}
# Training refuses these before its ranks meet, others after that; it opens no export and no codes.
BEFORE = ["run names code", "run links out", "tokenizers have code", "index leads out"]
AFTER = ["blocks are a pickle", "checkpoint leads out"]


def check(done, what) -> None:
    assert done.deeds == [], what
    assert done.code in (0, 1, 2), what
    assert "Traceback" not in done.out + done.err, what
    if done.code == 2:
        assert done.err.startswith("error: "), (what, done.err)
        assert len(done.err.splitlines()) == 1, (what, done.err)
    assert not Path("marked").exists(), what


@pytest.fixture
def handed(handed):
    (handed.folder / "pairs.tsv").write_text("x = 1\tx = 2\ny = 1\ty = 2\n")
    return handed


@pytest.mark.slow
def test_each_command_opens_honest_files(honest, handed):
    for arguments in OF_T5VAE.values():
        honest(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("evil", EVIL)
def test_no_command_is_fooled(handed, command, launched, evil):
    EVIL[evil](handed)
    for name, arguments in OF_T5VAE.items():
        check(command(*arguments), name)
    for name, arguments in OF_LAUNCHER.items():
        check(launched(*arguments), name)


@pytest.mark.parametrize("evil", BEFORE)
def test_nor_is_training(handed, refused, evil):
    EVIL[evil](handed)
    refused("train", "run/config.yaml", "train.steps=13")
    assert not Path("marked").exists()


@pytest.mark.distributed
@pytest.mark.parametrize("evil", AFTER)
def test_nor_is_training_that_has_begun(handed, evil):
    EVIL[evil](handed)
    command = [sys.executable, "-P", "-m", "t5vae", "train", "run/config.yaml", "train.steps=13"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert not Path("marked").exists()


def test_all_commands_are_tried():
    """All but those that open nothing that a stranger could have handed over."""
    tried = {words[0] for words in (*OF_T5VAE.values(), *OF_LAUNCHER.values())}
    listed = {name for app in (of_t5vae, of_launcher) for name in get_command(app).commands}
    assert listed - tried == {"doctor", "quickstart", "train"}
