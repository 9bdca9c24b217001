"""Locks on open files, and file systems that have none."""

import errno
import fcntl
import os
from enum import Enum
from pathlib import Path
from typing import IO, Any

from t5vae.common.openers import only_file

# Of a link, a folder, a socket, and of what else is no file.
NO_FILE = frozenset({errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EINVAL})
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})  # Lustre without -o flock


class Lock(Enum):
    """What became of an attempt to lock a file."""

    MINE = "this process has it until it closes the file or ends"
    ANOTHERS = "another process has it"
    NONE = "the file system has no locks"


def open_lock(path: Path) -> IO[str]:
    """Open a file that is to be locked, to read and to append to; it is made if there is none.

    Raises:
        OSError: that fails; with EINVAL where a link or no file is in its place, for anybody may
            have put it there.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return open(only_file(str(path), flags), "a+", errors="replace")
    except OSError as error:
        if error.errno in NO_FILE:
            raise OSError(errno.EINVAL, f"{path} is no file") from None
        raise


def take_lock(file: IO[Any], *, shared: bool = False, wait: bool = False) -> Lock:
    """Lock an open file.

    Args:
        file: open for writing unless `shared`: file servers ask for that.
        shared: let others lock it so too.
        wait: until the other process ends.

    Raises:
        OSError: that fails otherwise.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return Lock.ANOTHERS
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return Lock.NONE
    return Lock.MINE
