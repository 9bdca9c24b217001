"""`t5vae doctor`: what it says of a machine, what it keeps to itself, when it fails."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from t5vae.cluster.scheduler import about_cluster
from t5vae.planning import doctor

ROWS = ["versions", "system", "cpu", "devices", "precision", "slurm", "disk", "network"]


@pytest.fixture
def quick(monkeypatch):
    """Without a process that starts as training does."""
    monkeypatch.setattr(doctor, "START", "pass")


def test_a_machine_that_trains_is_one_page_without_names_or_secrets(tmp_path):
    home = tmp_path / "alice"
    home.mkdir()
    secret = {"WANDB_API_KEY": "hunter2", "HF_TOKEN": "hunter2", "T5VAE_CACHE": "/scratch/alice"}
    environment = os.environ | {"HOME": str(home), "LOGNAME": "alice", "OMP_NUM_THREADS": "3"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "t5vae", "doctor"],
        env=environment | secret | {"DS_ACCELERATOR": "cpu"},
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, last = done.stdout.splitlines()
    assert [row.split()[0] for row in rows] == [*ROWS, "optional", "set"]
    assert last == "training can start here"
    assert done.stderr == ""
    assert not [word for word in ("alice", "hunter2", str(tmp_path)) if word in done.stdout]
    assert "OMP_NUM_THREADS=3" in rows[-1]
    assert "WANDB_API_KEY" in rows[-1]


def test_names_are_left_out_where_they_are_words_of_their_own(monkeypatch):
    monkeypatch.setenv("HOME", "/home/al")
    monkeypatch.setenv("LOGNAME", "lab-al")
    text = "/home/al/env, /data/lab-al/x, /scratch/al: almost al"
    assert doctor.anonymous(text) == "~/env, /data/USER/x, /scratch/USER: almost USER"
    monkeypatch.setenv("HOME", "/")
    assert doctor.anonymous("/a/b") == "/a/b"


def test_a_process_that_cannot_start_is_a_problem_and_exit_code_1(t5vae, quick, monkeypatch):
    monkeypatch.setattr(doctor, "START", "raise OSError('no such device')")
    code, out, _ = t5vae("doctor")
    assert code == 1
    assert "problem   a process cannot start as training does: OSError: no such device" in out
    assert out.endswith("training cannot start here\n")


def test_a_process_that_waits_for_itself_is_told_what_to_do(quick, monkeypatch):
    monkeypatch.setattr(doctor, "START", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "PATIENCE", 0.5)
    (problem,) = doctor.examine().problems
    assert "/etc/hosts" in problem


def test_an_installation_that_does_not_load_is_a_problem(quick, monkeypatch):
    monkeypatch.setitem(sys.modules, "t5vae.training.precision", None)
    found = doctor.examine()
    assert found.rows["devices"] == "what training needs does not load"
    assert "install t5vae again" in found.problems[0]


def test_a_full_temporary_folder_is_a_problem(quick, monkeypatch):
    usage = SimpleNamespace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    (problem,) = doctor.examine().problems
    assert "1 MiB free: make room, or set TMPDIR" in problem


def test_no_temporary_folder_that_can_be_written_is_a_problem(quick, monkeypatch):
    def none():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(doctor.tempfile, "gettempdir", none)
    assert "set TMPDIR" in doctor.examine().problems[0]


@pytest.mark.parametrize(
    ("sinfo", "says"),
    [
        ("echo 'gpu* of 4 nodes with 64 cores and gpu:8'", "gpu* of 4 nodes with 64 cores"),
        ("echo 'Unable to contact' >&2; exit 1", "sinfo fails: Unable to contact"),
    ],
)
def test_slurm_is_asked(sinfo, says, tmp_path, monkeypatch):
    for name, script in (("sbatch", "echo slurm-wlm 22.05"), ("sinfo", sinfo)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert about_cluster().startswith(f"slurm-wlm 22.05; {says}")
    monkeypatch.setenv("PATH", "/nowhere")
    assert about_cluster() == "none: this machine has no sbatch"
