"""Measure MMD forward and backward beside two matrix products, and beside its peers.

    python benchmarks/mmd.py --quick --only multi_rbf,imq
    python benchmarks/mmd.py --peers-python PEERS/bin/python --write

Each contender runs in a process of its own (`_mmd_peers.py`), where the products are timed before
and after it in every turn, so that a noisy machine hits both alike. On a GPU: `gpu.py`.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path
from statistics import median

from _mmd_peers import CONTENDERS, Contender
from _report import Block, Page, Target, figure, installed, ratios, say, short, table

WORKER = Path(__file__).with_name("_mmd_peers.py")
CORES = len(os.sched_getaffinity(0))
THREADS = (1, CORES) if CORES > 1 else (1,)
WANTED = {(512, 128): 1.5, (2048, 128): 1.1, (4096, 1000): 0.95}
WANTED_OF_BLOCK = 1.3
GROWTH = [(1024, 128), (2048, 128), (4096, 128), (8192, 128)]


@dataclass
class Result:
    """What the process of a contender printed."""

    seconds: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    bytes: int = 0
    note: str = ""
    """Why there is nothing."""

    def ratios(self) -> list[float]:
        return ratios(self.seconds, self.limits)

    def cell(self) -> str:
        if not self.seconds:
            return self.note
        found = self.ratios()
        middle = figure(median(found))
        return f"{middle} ({short(min(found))} to {short(max(found))})" if found[1:] else middle

    def memory(self) -> str:
        return short(self.bytes / 2**20) if self.seconds else ""


@dataclass(frozen=True)
class Bench:
    """What to measure, by which Python, and for how long."""

    names: tuple[str, ...]
    peers_python: str
    quick: bool

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return list(WANTED)[:2] if self.quick else list(WANTED)

    def times(self, name: str, N: int, D: int, threads: int) -> Result:
        return self.run(name, N, D, threads, 1 if self.quick else 3)

    def peak(self, name: str, N: int, D: int) -> Result:
        """One turn, in which all but small blocks are given back as soon as they are free."""
        return self.run(name, N, D, 1, 0, MALLOC_MMAP_THRESHOLD_="65536")

    def run(
        self, name: str, N: int, D: int, threads: int, seconds: float, **settings: str
    ) -> Result:
        """Its turns of so many seconds together; a last one may take longer."""
        contender = CONTENDERS[name]
        if lack := out_of_reach(contender, N, D):
            return Result(note=lack)
        say(f"{name}, N = {N}, D = {D}, threads: {threads}")
        python = self.peers_python if contender.packages else sys.executable
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | settings
        environment.pop("TORCHDYNAMO_DISABLE", None)
        cut_off = 60 if self.quick else 150
        try:
            done = subprocess.run(
                [python, str(WORKER), *map(str, (name, N, D, threads, seconds))],
                env=environment,
                capture_output=True,
                timeout=cut_off,
            )
        except subprocess.TimeoutExpired as expired:
            return read(expired.stdout or b"", f"cut off after {cut_off} s")
        errors = done.stderr.decode()
        if done.returncode:
            say(errors)
        return read(done.stdout, f"failed: {(errors.splitlines() or ['ended'])[-1][:80]}")


def out_of_reach(contender: Contender, N: int, D: int) -> str:
    tile = 4 * N * N * D
    memory = Path("/proc/meminfo").read_text()
    available = 1024 * int(memory.split("MemAvailable:")[1].split()[0])
    return "" if contender.tiles * tile < available else f"cannot run ({tile / 1e9:.0f} GB a tile)"


def read(printed: bytes, note: str) -> Result:
    turns = [json.loads(line) for line in printed.splitlines() if line.startswith(b"{")]
    kept = turns[1:] or turns  # the first warms up
    return Result(
        seconds=[turn["seconds"] for turn in kept],
        limits=[turn["limit"] for turn in kept],
        bytes=max((turn["bytes"] for turn in turns), default=0),
        note=note,
    )


def times(bench: Bench, N: int, D: int) -> Block:
    found = {
        (name, threads): bench.times(name, N, D, threads)
        for name, threads in product(bench.names, THREADS)
    }
    rows = [
        (
            CONTENDERS[name].title,
            *(found[name, threads].cell() for threads in THREADS),
            bench.peak(name, N, D).memory() if found[name, 1].seconds else "",
        )
        for name in bench.names
    ]
    size = f"N = {N:,}, D = {D:,}"
    targets = [
        Target(
            f"{CONTENDERS[name].title}, {size}, {in_words(threads)}",
            WANTED_OF_BLOCK if CONTENDERS[name].ranks > 1 else WANTED[N, D],
            median(result.ratios()),
            at_most=True,
        )
        for (name, threads), result in found.items()
        if name in ("multi_rbf", "imq", "block", "block_imq") and result.seconds
    ]
    text = f"{limit_in_words(found, N, D)}\n\n"
    header = ("", *map(in_words, THREADS), "MiB")
    return Block(size, text + table(header, rows), targets)


def in_words(threads: int) -> str:
    return "one thread" if threads == 1 else f"{threads} threads"


def limit_in_words(found: dict[tuple[str, int], Result], N: int, D: int) -> str:
    parts = []
    for threads in THREADS:
        limits = [
            result.limits
            for (name, used), result in found.items()
            if used == threads and CONTENDERS[name].ranks == 1
        ]
        if seconds := list(chain(*limits)):
            rate = 4 * N * N * D / median(seconds) / 1e9
            parts.append(
                f"{1000 * median(seconds):,.2f} ms with {in_words(threads)} "
                f"({rate:,.0f} billion operations a second)"
            )
    return f"The two products take {' and '.join(parts)}."


def growth(bench: Bench) -> Block:
    peaks = {N: bench.peak("multi_rbf", N, D).bytes for N, D in GROWTH}
    rows = [
        (f"{N:,}", short(peak / 2**20), figure(peak / 1024 / N), figure(peak / (4 * N * N)))
        for N, peak in peaks.items()
    ]
    header = ("N, with D = 128", "MiB", "KiB a code", "over an [N, N] matrix")
    last, before = peaks[8192], peaks[4096]
    target = Target("memory, N = 8,192 over N = 4,096", 2.1, last / before, at_most=True)
    return Block("growth", table(header, rows), [target])


def main() -> None:
    every = [name for name in CONTENDERS if not name.startswith("triton")]
    quick = "two sizes and fewer turns"
    page = Page(__doc__, "benchmarks/mmd.md", quick=quick, only=every)
    page.add_argument("--peers-python", default=sys.executable, help="a Python with the peers")
    args = page.options()

    packages = sorted(set(chain(*(CONTENDERS[name].packages for name in every))))
    theirs = installed(*packages, python=args.peers_python)
    lacking = [name for name in args.only if set(CONTENDERS[name].packages) - set(theirs)]
    names = tuple(name for name in args.only if name not in lacking)
    bench = Bench(names, args.peers_python, args.quick)
    blocks = [times(bench, N, D) for N, D in bench.sizes]
    if "multi_rbf" in names:
        blocks.append(growth(bench))
    titles = ", ".join(CONTENDERS[name].title for name in lacking)
    more = f"Not measured, since their packages are not installed: {titles}." if lacking else ""
    page.publish(blocks, installed("torch") | theirs, more)


if __name__ == "__main__":
    main()
