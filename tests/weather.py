"""Storage that fails, below the code: files that do not read, and file systems without locks."""

import builtins
import errno
import io
import os
from collections.abc import Callable
from typing import Any

import pytest


class _Failing(io.FileIO):
    """A file that fails once its reading reaches a place, and then stays broken."""

    def __init__(self, path: Any, faults: list[int], begin: int):
        super().__init__(path, "rb")
        self._faults, self._begin, self._broken = faults, begin, 0

    def readinto(self, buffer: Any) -> int:
        if self._faults and not self._broken and self.tell() >= self._begin:
            self._broken = self._faults.pop(0) if self._faults[0] > 0 else -self._faults[0]
        if self._broken:
            raise OSError(self._broken, os.strerror(self._broken))
        return super().readinto(buffer)


class Weather:
    """Makes files fail that are opened unbuffered.

    Attributes:
        opened: the names of all that were opened so.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.opened: list[str] = []
        self._strikes: dict[str, tuple[list[int], int]] = {}
        monkeypatch.setattr("t5vae.common.storage._patience", 0.3)
        monkeypatch.setattr("t5vae.common.storage.SHORTEST", 0.01)
        self._open: Callable[..., Any] = builtins.open
        monkeypatch.setattr(builtins, "open", self._opened)

    def strike(self, name: str, *faults: int, begin: int = 0) -> None:
        """Let files whose names end so fail, one fault an opening; a negative one never ends."""
        self._strikes[name] = list(faults), begin

    def clear(self) -> None:
        """Let all files be read."""
        self._strikes.clear()
        self.opened.clear()

    def _opened(self, path: Any, mode: str = "r", buffering: int = -1, **more: Any) -> Any:
        if mode != "rb" or buffering != 0:
            return self._open(path, mode, buffering, **more)
        self.opened.append(os.path.basename(path))
        for name, (faults, begin) in self._strikes.items():
            if str(path).endswith(name):
                return _Failing(path, faults, begin)
        return self._open(path, mode, buffering)


def without_locks(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOSYS) -> None:
    """Let locks of files fail, as on a file system that has none."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
