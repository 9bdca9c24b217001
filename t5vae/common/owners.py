"""Whose files are, in places where other users may put some."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def is_mine(path: Path) -> bool:
    """Whether a file or folder belongs to this user; of a link, the link itself.

    Some mounts give every file one owner, or root's to nobody: what counts is the owner that a file
    gets that is made beside it.

    Raises:
        OSError: there is none.
    """
    owner = os.lstat(path).st_uid
    if owner == os.geteuid():
        return True
    with suppress(OSError), tempfile.TemporaryFile(dir=path.parent) as file:
        return os.fstat(file.fileno()).st_uid == owner
    return False
