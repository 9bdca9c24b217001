"""The folder of a halted build: whose it is, and when it goes."""

import errno
import json
import os
import shutil
import subprocess
import sys

import psutil
import pytest

from t5vae.common.errors import StorageError, UserError
from t5vae.common.workfolder import LOCK, work_folder
from tests.refused import refusal
from tests.weather import without_locks


def halt(out, error, done=()):
    """Begin to build, and end with an error; `done` files are of use."""
    with work_folder(out, lambda folder: (folder / "done").exists()) as folder:
        for name in done:
            (folder / name).write_text("")
        raise error


def left(tmp_path) -> list[str]:
    return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))


def test_a_build_that_ends_well_leaves_nothing(tmp_path):
    with work_folder(tmp_path / "out", lambda _: True) as folder:
        (folder / "parts").mkdir()
        (folder / "parts" / "file").write_text("")
    assert left(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.ESTALE])
def test_what_halts_a_build_leaves_its_folder_and_says_how_to_go_on(tmp_path, number):
    error = StorageError if number in (errno.EIO, errno.ESTALE) else UserError
    with pytest.raises(error, match="the same command") as caught:
        halt(tmp_path / "out", OSError(number, os.strerror(number)), ["half"])
    assert len(str(caught.value).splitlines()) == 1
    assert left(tmp_path) == [".out.build", ".out.build/half", ".out.build/lock"]


@pytest.mark.parametrize("error", [StorageError("x fails"), KeyboardInterrupt(), MemoryError()])
def test_so_does_whatever_is_nobodys_mistake(tmp_path, error):
    with pytest.raises(type(error)):
        halt(tmp_path / "out", error, ["half"])
    assert ".out.build/half" in left(tmp_path)


def test_a_mistake_leaves_what_is_of_use_alone(tmp_path):
    assert refusal(halt, tmp_path / "out", UserError("line 2"), ["half"]) == "line 2"
    assert left(tmp_path) == []
    said = refusal(halt, tmp_path / "out", UserError("line 2"), ["half", "done"])
    assert said.startswith("line 2; what is done is kept")
    assert "run the same command again" in said
    assert ".out.build/done" in left(tmp_path)


def test_a_folder_that_cannot_be_removed_fails_no_build(tmp_path, monkeypatch, capsys):
    def busy(*_, **__):
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", busy)
    with work_folder(tmp_path / "out", lambda _: True) as folder:
        (folder / "parts").mkdir()
    assert f"cannot remove {folder} (Directory not empty)" in capsys.readouterr().err


@pytest.fixture
def other():
    """Another process."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def held(tmp_path, **by):
    """Leave a lock's file that says who has the folder."""
    holder = {"host": os.uname().nodename, **by}
    (tmp_path / ".out.build").mkdir()
    (tmp_path / ".out.build" / LOCK).write_text(json.dumps(holder))


def test_without_locks_a_live_process_of_this_host_keeps_its_folder(
    tmp_path, monkeypatch, other, capsys
):
    started = psutil.Process(other.pid).create_time()
    held(tmp_path, process=other.pid, started=started)
    without_locks(monkeypatch)
    assert "another process is building" in refusal(halt, tmp_path / "out", MemoryError())
    other.kill()
    other.communicate()
    with work_folder(tmp_path / "out", lambda _: False):
        pass
    assert left(tmp_path) == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}"])
def test_without_locks_any_folder_that_nobody_has_is_taken(tmp_path, monkeypatch, text):
    held(tmp_path)
    (tmp_path / ".out.build" / LOCK).write_text(text)
    without_locks(monkeypatch)
    with work_folder(tmp_path / "out", lambda _: False):
        pass


def test_without_locks_another_process_by_the_same_number_has_no_folder(
    tmp_path, monkeypatch, other
):
    held(tmp_path, process=other.pid, started=psutil.Process(other.pid).create_time() - 60)
    without_locks(monkeypatch)
    with work_folder(tmp_path / "out", lambda _: False):
        pass


def test_without_locks_another_hosts_folder_is_taken_and_that_is_said(
    tmp_path, monkeypatch, other, capsys
):
    held(tmp_path, host="node7", process=other.pid, started=0.0)
    without_locks(monkeypatch)
    with work_folder(tmp_path / "out", lambda _: False):
        pass
    assert "node7 began to build" in capsys.readouterr().err


def test_without_locks_this_process_goes_on_with_its_own(tmp_path, monkeypatch, capsys):
    without_locks(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        halt(tmp_path / "out", KeyboardInterrupt(), ["half"])
    assert json.loads((tmp_path / ".out.build" / LOCK).read_text()).keys() == {"folder"}
    with work_folder(tmp_path / "out", lambda _: False) as folder:
        assert (folder / "half").exists()
