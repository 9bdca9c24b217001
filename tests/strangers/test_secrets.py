"""Secrets of whoever trains: none gets into a file of the run, its logs or its trackers'."""

import os
import subprocess
import sys

import pytest

from tests.launching import environment, run_of, small_config
from tests.small_runs import dataset, python_lines  # noqa: F401

SECRET = "canary-5471"
NAMES = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MY_PASSWORD", "SLURM_JWT", "T5VAE_TOKEN")


@pytest.mark.distributed
def test_no_secret_of_the_environment_is_written_down(dataset, tmp_path):  # noqa: F811
    every = {"every": 2, "sequences": 8, "decoded": 4}
    log = {"every": 1, "wandb": True, "tensorboard": True}
    config = small_config(
        tmp_path, dataset, train={"steps": 3}, log=log, eval=every, checkpoint={"every": 2}
    )
    secrets = dict.fromkeys(NAMES, SECRET) | {"WANDB_API_KEY": SECRET * 4, "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, "-m", "t5vae", "train", str(config)],
        env={**environment(), "TMPDIR": str(tmp_path), "HOME": str(tmp_path / "home"), **secrets},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    run = run_of(config)
    assert {"wandb", "tensorboard", "logs", "samples", "checkpoints"} <= set(os.listdir(run))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in done.stdout
