"""How many CPUs this process may use: what it may run on, and what its container is rationed to."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def cpus(root: Path = Path("/")) -> int:
    """CPUs for the threads and workers of this process, at least one.

    Args:
        root: of the file system that says what the process's cgroups are rationed to.
    """
    affinity = getattr(os, "sched_getaffinity", lambda process: range(os.cpu_count() or 1))
    return max(1, min([len(affinity(0)), *map(math.ceil, _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """CPUs' worth of time that each cgroup around this process may take, where it is limited."""
    lines = []
    with suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        top = root / "sys/fs/cgroup" / controllers
        own = top / path.lstrip("/")  # in a container as the host names it, or not there at all
        for folder in (own, *own.parents):
            with suppress(OSError, ValueError):
                yield _quota(folder)
            if folder == top:
                break


def _quota(folder: Path) -> float:
    """A cgroup's, of version 2 or 1; ValueError for one without limit."""
    with suppress(FileNotFoundError):
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)  # "max" is no number
    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    if int(quota) < 0:
        raise ValueError
    return int(quota) / int(period)
