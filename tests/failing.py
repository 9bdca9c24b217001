"""Storage that fails: the system's own calls, below the code, on what a path ends in."""

import builtins
import io
import math
import os
from collections.abc import Callable
from typing import Any

import pytest

from t5vae.common import storage

CALLS: dict[str, list[tuple[Any, str]]] = {
    "open": [(builtins, "open"), (io, "open"), (os, "open")],
    "stat": [(os, "stat")],
    "list": [(os, "listdir"), (os, "scandir")],
    "rename": [(os, "rename"), (os, "replace")],
    "mkdir": [(os, "mkdir")],
    "rmdir": [(os, "rmdir")],
}


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Makes calls fail with an error's number, the first so many times; patience is short.

    `done` lets them do first what they then say has failed. Gives the paths that met with it.
    """
    monkeypatch.setattr(storage, "SHORTEST", 0.01)
    monkeypatch.setattr(storage, "_patience", 0.2)

    def start(
        call: str, ending: str, number: int, times: float = math.inf, *, done: bool = False
    ) -> list[str]:
        met: list[str] = []
        for module, name in CALLS[call]:
            real = getattr(module, name)

            def attempt(path: Any, *args: Any, real: Any = real, **kwargs: Any) -> Any:
                if not str(path).endswith(ending) or len(met) >= times:
                    return real(path, *args, **kwargs)
                met.append(str(path))
                if done:
                    real(path, *args, **kwargs)
                raise OSError(number, os.strerror(number), str(path))

            monkeypatch.setattr(module, name, attempt)
        return met

    return start
