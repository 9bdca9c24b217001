"""What is asked of a device meanwhile: reads, shapes that data decide, copies that are waited for.

On an accelerator the host waits for each of them until the device has done all that it was told.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}
"""Operations that the host waits for, whoever calls them; boolean indices come to nonzero."""
TO_HOST = {"item", "tolist", "numpy", "cpu", "__array__"}
"""Methods that read memory, which a CPU's does without an operation."""
FROM_HOST = {"tensor", "as_tensor", "asarray", "new_tensor", "scalar_tensor"}
"""Functions that copy from Python's memory where they are given a device."""


class Questions:
    """Notes them while it is entered, and who asked.

    Attributes:
        asked: ("t5vae/...py:NAME", what) for each.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.modes = (_Functions(self), _Operations(self))

    def __enter__(self) -> Self:
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)

    def note(self, what: str) -> None:
        self.asked.append((_asker(), what))

    def of(self, package: str) -> Counter[tuple[str, str]]:
        """Those of a package."""
        return Counter(each for each in self.asked if each[0].startswith(f"{package}/"))


class _Functions(TorchFunctionMode):
    def __init__(self, questions: Questions):
        super().__init__()
        self.questions = questions

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in TO_HOST:
            self.questions.note(name)
        elif name in FROM_HOST and (kwargs.get("device") is not None or name == "new_tensor"):
            self.questions.note(f"{name} on a device")
        elif name == "to" and not kwargs.get("non_blocking"):
            given = (*args[1:], *kwargs.values())
            if any(isinstance(each, (torch.device, str)) for each in given):
                self.questions.note("to a device, waiting")
        return function(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, questions: Questions):
        super().__init__()
        self.questions = questions

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.name().removeprefix("aten::").partition(".")[0]
        if name in READS or _by_mask(name, args):
            self.questions.note(name)
        return function(*args, **(kwargs or {}))


def _by_mask(name: str, args: Any) -> bool:
    """Whether rows are taken by a mask, whose number of them is read."""
    if name not in ("index", "index_put", "index_put_"):
        return False
    return any(
        isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1]
    )


def _asker() -> str:
    """The innermost frame that is not torch's or this file's: "package/file.py:function"."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and "/torch/" not in path and not path.startswith("<"):
            for package in ("t5vae", "shards", "deepspeed", "transformers"):
                if f"/{package}/" in path:
                    inside = path.rpartition(f"/{package}/")[2]
                    return f"{package}/{inside}:{frame.f_code.co_name}"
            return f"elsewhere/{Path(path).name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "nobody/"
