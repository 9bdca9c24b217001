"""A process of `gpu.py`: it imports what its sections need, then carries out one after another.

    _gpu_worker.py SECTION=MODULE ...

It reads orders from standard input, a JSON object a line, and answers in the same way: first that
it is there, and what its device is; of each order the parts of its section as they are ready, and
how it ended.
"""

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from _report import ROOT, Target

T = TypeVar("T")
TESTS = [str(ROOT / "tests" / folder) for folder in ("objective", "model")]
"""Folders of modules with cases and formulas; an installed package may be called `tests` too."""


class Part(NamedTuple):
    """A piece of a section's page; a later one of the same name takes its place."""

    name: str
    text: str
    targets: tuple[Target, ...] = ()


class Bench(NamedTuple):
    """What a section has to work with.

    Attributes:
        data: folder of what `gpu.py --prepare` built.
        out: folder that is kept, for logs.
        scratch: folder of its own, which is not.
        smoke: toy sizes.
        end: when its time is over, in seconds since the epoch.
        device: "cuda" or "cpu".
    """

    data: Path
    out: Path
    scratch: Path
    smoke: bool
    end: float
    device: str

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.time()

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def lines(self) -> Path:
        """Shards of lines of up to 32 tokens."""
        return self.data / "lines"

    @property
    def short_lines(self) -> Path:
        """Those of `quality.py`."""
        return self.data / "short-lines"


Section = Callable[[Bench], Iterator[Part]]


def tried(run: Callable[..., T], *arguments: Any) -> T | str:
    """What a call returns, or in one line how it failed; the traceback is in the log."""
    try:
        return run(*arguments)
    except Exception as error:
        traceback.print_exc()
        first = (str(error).strip() or "no message").splitlines()[0]
        return f"{type(error).__name__}: {first}"


def device() -> tuple[str, str]:
    """Its kind, and its name."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return "cpu", "the CPU"
    import torch

    if not torch.cuda.is_available():
        return "cpu", "the CPU"
    return "cuda", torch.cuda.get_device_name()


def main(modules: list[str]) -> None:
    sys.path[:0] = TESTS
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print belongs in the log
        sections = {name: vars(import_module(module)) for name, module in map(pair, modules)}
        kind, title = device()
        send(answers, {"device": title})
        for line in sys.stdin:
            order = json.loads(line)
            name, end = order.pop("name"), time.time() + order.pop("seconds")
            folders = [Path(order.pop(folder)) for folder in ("data", "out", "scratch")]
            bench = Bench(*folders, **order, end=end, device=kind)
            carry_out(sections[name][name], bench, answers)


def pair(section: str) -> tuple[str, str]:
    name, _, module = section.partition("=")
    return name, module


def carry_out(section: Section, bench: Bench, answers: IO[str]) -> None:
    bench.scratch.mkdir(parents=True, exist_ok=True)

    def tell() -> None:
        for part in section(bench):
            send(answers, {"part": part})

    failure = tried(tell)
    gc.collect()
    send(answers, {"ended": f"failed: {failure}" if failure else "whole"})


def send(answers: IO[str], answer: dict) -> None:
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
