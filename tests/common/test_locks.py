"""Locks of files, shared and not, and file systems without them."""

import errno
import fcntl

import pytest

from t5vae.common.locks import Lock, take_lock
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
