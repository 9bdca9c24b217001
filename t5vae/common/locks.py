"""Locks on open files, and file systems that have none."""

import errno
import fcntl
from enum import Enum
from typing import IO, Any

NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})  # Lustre without -o flock


class Lock(Enum):
    """What became of an attempt to lock a file."""

    MINE = "this process has it until it closes the file or ends"
    ANOTHERS = "another process has it"
    NONE = "the file system has no locks"


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
