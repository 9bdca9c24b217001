"""What the benchmarks share to measure: clocks, turns, memory. It needs no more than torch."""

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CPU = torch.device("cpu")


def wait(device: torch.device = CPU) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds(run: Callable, *arguments: Any, device: torch.device = CPU) -> float:
    """Of one call."""
    wait(device)
    begin = time.perf_counter()
    run(*arguments)
    wait(device)
    return time.perf_counter() - begin


def per(count: int, run: Callable[[], object]) -> Callable[[], float]:
    """Seconds of one of so many that a call is for."""
    return lambda: seconds(run) / count


def take_turns(runs: dict[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """What each comes to in every turn after a first one, whose order alternates."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            value = runs[name]()
            if turn:
                found[name].append(value)
    return found


def cpu_seconds() -> float:
    """CPU of this process with all its threads, and of its ended children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def status_bytes(key: str) -> int:
    """VmRSS, or VmHWM: the most this process had; getrusage tells the parent's if that is more."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{key}:")[1].split()[0])
