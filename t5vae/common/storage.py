"""Storage that fails for a while: tried again, each time opened afresh, and only then named."""

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from t5vae.common.errors import StorageError, first_line

WEATHER = frozenset(
    {
        errno.EAGAIN,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EIO,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.ENOLINK,
        errno.ENOTCONN,  # a FUSE mount whose program has ended
        errno.EREMOTEIO,
        errno.ESHUTDOWN,  # Lustre, after an eviction
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
"""What servers and disks say that may answer again: no damage, and no user's mistake."""

PATIENCE = 180.0  # seconds in all
SHORTEST, LONGEST = 0.1, 20.0  # seconds between two tries

logger = logging.getLogger("shards")
_patience = PATIENCE

Result = TypeVar("Result")


def limit_patience(seconds: float) -> None:
    """Let this process wait for storage at most so long, where others wait for it meanwhile."""
    global _patience
    _patience = min(PATIENCE, seconds)


def patiently(attempt: Callable[[], Result], name: str) -> Result:
    """What an attempt returns; while the weather is bad it is made again, after growing waits.

    Args:
        attempt: reads or writes something, and opens afresh all that it needs.
        name: of what is read or written, for people.

    Raises:
        StorageError: it failed for three minutes.
        OSError: it failed otherwise, at once.
    """
    began, wait = time.monotonic(), SHORTEST
    while True:
        try:
            return attempt()
        except OSError as error:
            if error.errno not in WEATHER:
                raise
            left = began + _patience - time.monotonic()
            if left <= 0:
                raise StorageError(
                    f"{name}: the storage fails ({first_line(error)}), tried for {_patience:g} s; "
                    "the same command goes on once it answers"
                ) from error
            if wait == SHORTEST:
                logger.warning("%s: %s; trying again", name, first_line(error))
        time.sleep(min(wait, left))
        wait = min(2 * wait, LONGEST)
