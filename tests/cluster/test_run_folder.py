"""The lock of a run's folder: one process trains in it at a time."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from t5vae.cluster.run_folder import LOCK, lock_run, make_folder
from tests.refused import refusal
from tests.weather import without_locks


@pytest.fixture
def folder(tmp_path) -> Path:
    """Of a run, not there yet."""
    return tmp_path / "run"


def test_a_run_folder_is_made_and_locked(folder):
    with lock_run(folder):
        assert (folder / "checkpoints").is_dir()
        message = refusal(lock_run, folder)
        assert str(folder) in message
    lock_run(folder).close()


def test_a_lock_dies_with_its_process(folder):
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        lock = lock_run(folder)
        os.write(tell, b"held")
        signal.pause()
        lock.close()
    os.close(tell)
    try:
        assert os.read(ready, 4) == b"held"
        assert "another process" in refusal(lock_run, folder)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
    lock_run(folder).close()


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        assert str(path) in refusal(lock_run, path)
        assert str(path / "logs") in refusal(make_folder, path / "logs")


def test_one_that_is_to_start_anew_refuses_a_folder_with_checkpoints(folder):
    lock_run(folder, anew=True).close()
    (folder / "checkpoints/step-00000010").mkdir()
    assert "never" in refusal(lock_run, folder, anew=True)
    lock_run(folder).close()


def hold(folder, **holder):
    """Leave a lock that nobody has, as a file system without locks shows it."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / LOCK).write_text(json.dumps({"host": "node3", **holder}))


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


def test_the_lock_says_who_holds_it(folder, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURMD_NODENAME", "node3")
    with lock_run(folder):
        assert "(job 77 on node3)" in refusal(lock_run, folder)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_run_that_another_job_trains_is_refused_even_where_files_have_no_locks(
    folder, squeue, monkeypatch, number
):
    without_locks(monkeypatch, number)
    hold(folder, job="77")
    squeue("77 RUNNING")
    assert "(job 77 on node3)" in refusal(lock_run, folder)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    lock_run(folder).close()


def test_a_lock_of_a_job_that_ended_is_taken(folder, squeue):
    hold(folder, job="77")
    squeue("")
    lock_run(folder).close()


@pytest.mark.parametrize("text", ["", "{", "0123abcd", "[1]", "{}"])
def test_a_lock_with_any_content_can_be_taken(folder, text):
    hold(folder)
    (folder / LOCK).write_text(text)
    lock_run(folder).close()
