"""Openers for `open`."""

import errno
import os
import stat


def only_file(path: str, flags: int) -> int:
    """Open a file, and nothing else that may lie in its place: a pipe would be waited for.

    Raises:
        OSError: that fails; with EINVAL of what is no file.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # folders are for `open` to refuse
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", path)
    return descriptor
