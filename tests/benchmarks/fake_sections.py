"""Sections for `benchmarks/gpu.py` that do what sections should not."""

import os
import time
from collections.abc import Iterator

from _gpu_worker import Bench, Part
from _report import Target


def good(bench: Bench) -> Iterator[Part]:
    yield Part("table", "a first table", (Target("a ratio", 2, 1),))
    yield Part("table", "a table", (Target("a ratio", 2, 3),))


def after(bench: Bench) -> Iterator[Part]:
    yield Part("table", f"it had {'some' if bench.left > 0 else 'no'} time, in {bench.device}")


def raises(bench: Bench) -> Iterator[Part]:
    yield Part("table", "half of it")
    raise ValueError("a fault\nof two lines")


def dies(bench: Bench) -> Iterator[Part]:
    yield Part("table", "before its end")
    os._exit(3)


def hangs(bench: Bench) -> Iterator[Part]:
    yield Part("table", "what came in time")
    time.sleep(600)
