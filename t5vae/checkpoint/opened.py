"""Files that stay open from one read to the next: servers of metadata see few opens."""

import os
from functools import partial
from io import FileIO
from pathlib import Path

from t5vae.checkpoint.files import reach

KEPT = 16  # files that are open at once


class OpenFiles:
    """Reads files at any place, each opened once, or afresh after a read of it that failed.

    A context manager, which closes them.
    """

    def __init__(self) -> None:
        self.files: dict[Path, FileIO] = {}  # the one opened last comes last

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        while self.files:
            self.files.popitem()[1].close()

    def fill(self, path: Path, offset: int, into: memoryview) -> bool:
        """Fill a buffer from a file; whether the file goes so far.

        Raises:
            FileNotFoundError, StorageError, UserError: see `reach`.
        """
        return reach(path, partial(self._fill, path, offset, into))

    def _fill(self, path: Path, offset: int, into: memoryview) -> bool:
        descriptor, at = self._opened(path).fileno(), 0
        try:
            while at < len(into) and (count := os.preadv(descriptor, [into[at:]], offset + at)):
                at += count
        finally:
            if at < len(into):
                self.files.pop(path).close()
        return at == len(into)

    def _opened(self, path: Path) -> FileIO:
        if path not in self.files:
            if len(self.files) == KEPT:
                self.files.pop(next(iter(self.files))).close()
            self.files[path] = FileIO(os.open(path, os.O_RDONLY))
        return self.files[path]
