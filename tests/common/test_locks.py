"""Locks of files, shared and not, and file systems without them."""

import errno
import fcntl
import os
import socket

import pytest

from t5vae.common.locks import Lock, open_lock, take_lock
from tests.weather import without_locks


def test_one_has_a_lock_or_several_share_it(tmp_path):
    path = tmp_path / "lock"
    with open(path, "w") as first, open(path) as second, open(path) as third:
        assert take_lock(first) is Lock.MINE
        assert take_lock(second, shared=True) is Lock.ANOTHERS
        fcntl.flock(first, fcntl.LOCK_UN)
        assert take_lock(second, shared=True) is Lock.MINE
        assert take_lock(third, shared=True, wait=True) is Lock.MINE
        assert take_lock(first) is Lock.ANOTHERS


def test_a_lock_is_opened_to_be_read_and_added_to(tmp_path):
    for line in ("one\n", "two\n"):
        with open_lock(tmp_path / "lock") as file:
            file.write(line)
            file.seek(0)
            assert file.read().endswith(line)
    assert (tmp_path / "lock").read_text() == "one\ntwo\n"


def listening(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # a longer name would not fit


IN_ITS_PLACE = {
    "a link": lambda path: path.symlink_to(path.parent / "secret"),
    "a link to nothing": lambda path: path.symlink_to(path.parent / "nothing"),
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a socket": listening,
}


@pytest.mark.parametrize("what", IN_ITS_PLACE)
def test_what_is_no_file_is_not_opened_to_be_locked(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text("the secret\n")
    IN_ITS_PLACE[what](tmp_path / "lock")
    with pytest.raises(OSError, match="is no file") as caught:
        open_lock(tmp_path / "lock")
    assert caught.value.errno == errno.EINVAL
    assert (tmp_path / "secret").read_text() == "the secret\n"
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.parametrize("wait", [True, False])
def test_a_file_system_without_locks_is_told_as_that(tmp_path, monkeypatch, number, wait):
    without_locks(monkeypatch, number)
    with open(tmp_path / "lock", "w") as file:
        assert take_lock(file, wait=wait) is Lock.NONE


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EBADF])
def test_a_lock_that_fails_is_an_error(tmp_path, monkeypatch, number):
    without_locks(monkeypatch, number)
    with open(tmp_path / "lock", "w") as file, pytest.raises(OSError) as caught:  # noqa: PT011
        take_lock(file)
    assert caught.value.errno == number
