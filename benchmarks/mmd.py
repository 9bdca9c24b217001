"""Measure MMD forward and backward beside two matrix products, and beside its peers.

    python benchmarks/mmd.py --quick --only multi_rbf,imq
    python benchmarks/mmd.py --peers-python PEERS/bin/python --write

Each contender runs in a process of its own (`_mmd_peers.py`), where the products are timed before
and after it in every turn, so that a noisy machine hits both alike.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path
from statistics import median

import torch
from _mmd_peers import CHECKED_ROWS, COMPILED_ROWS, CONTENDERS, RANKS, Contender
from _report import Target, figure, installed, machine, publish, table

ROOT = Path(__file__).parents[1]
WORKER = ROOT / "benchmarks" / "_mmd_peers.py"
DOC = ROOT / "docs" / "benchmarks" / "mmd.md"

CORES = len(os.sched_getaffinity(0))
THREADS = (1, CORES) if CORES > 1 else (1,)
WANTED = {(512, 128): 1.5, (2048, 128): 1.1, (4096, 1000): 0.95}
WANTED_OF_BLOCK = 1.3
GROWTH = [(1024, 128), (2048, 128), (4096, 128), (8192, 128)]

ON_DEVICE = ("triton", "triton_imq")
DEVICE_SIZES = [(4096, 128), (32768, 128), (32768, 1000)]
DEVICE_CONTENDERS = ("multi_rbf", "imq", *ON_DEVICE, "cdist", "gemm", "gemm_compiled", "geomloss")
WANTED_OF_TRITON = 1.7

HEAD = """\
# How fast MMD is, forward and backward

Printed by `python benchmarks/mmd.py --peers-python PEERS/bin/python --write`, where PEERS is a \
virtual environment with `{install}`, on this machine: {machine} geomloss and KeOps run by the \
torch of that environment.
"""

TIMES = """\
## Time and memory

A figure is the time of the statistic of N codes of size D with its gradient, over that of two \
fp32 matrix products of 4 N² D operations in all, Z Zᵀ and [N, N] Z, into buffers that are there \
already: what any way by products has to do at least, were the matrix not symmetric. A rank of \
{ranks} has N / {ranks} of the N rows, and is measured, the gather aside, over the products for \
those rows. \
In each turn the products are timed before and after the contender, in the same process; figures \
are medians of the turns that fit into {seconds:g} s, and in brackets the least and the most of \
them. Memory is the peak of one turn over what the process had before, with one thread, in another \
process that keeps nothing of what is freed.

`mmd` has the prior N(0, I) in closed form; the peers draw N samples of it beforehand, and take \
the means of three blocks of the kernel, with gradients by autograd. geomloss has one Gaussian for \
a kernel, multi_rbf is the mean of five, and the original's formula is one of another bandwidth. \
Before it is timed, each contender's value and gradient are compared with the fp64 statistic, \
on {rows} rows, and where it is compiled on up to {compiled_rows:,}.
"""

GROWTH_TEXT = """\
## Memory over N

The peak of `mmd`, multi_rbf, with one thread.

"""

DEVICE_TEXT = """\
## On a GPU

The same on {device}, over the two products in tf32 and in bf16.
"""

NO_DEVICE = """\
## On a GPU

There was none on this machine.
"""


@dataclass
class Result:
    """What the process of a contender printed."""

    seconds: list[float] = field(default_factory=list)
    limits: list[dict[str, float]] = field(default_factory=list)
    bytes: int = 0
    note: str = ""
    """Why there is nothing."""

    def ratios(self, limit: str) -> list[float]:
        pairs = zip(self.seconds, self.limits, strict=True)
        return [seconds / limits[limit] for seconds, limits in pairs]

    def cell(self, limit: str = "fp32") -> str:
        if not self.seconds:
            return self.note
        ratios = self.ratios(limit)
        middle = figure(median(ratios))
        return f"{middle} ({short(min(ratios))} to {short(max(ratios))})" if ratios[1:] else middle

    def memory(self) -> str:
        return short(self.bytes / 2**20) if self.seconds else ""


def short(value: float) -> str:
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


@dataclass(frozen=True)
class Bench:
    """What to measure, by which Python, and for how long."""

    names: tuple[str, ...]
    peers_python: str
    quick: bool

    @property
    def seconds(self) -> float:
        """For the turns of one contender; a last turn may take longer."""
        return 1 if self.quick else 3

    @property
    def cut_off(self) -> float:
        """The seconds after which a contender's process is ended."""
        return 60 if self.quick else 150

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return list(WANTED)[:2] if self.quick else list(WANTED)

    def times(self, name: str, N: int, D: int, threads: int, device: str = "cpu") -> Result:
        return self.run(name, N, D, threads, device, self.seconds)

    def peak(self, name: str, N: int, D: int) -> Result:
        """One turn, in which all but small blocks are given back as soon as they are free."""
        return self.run(name, N, D, 1, "cpu", 0, MALLOC_MMAP_THRESHOLD_="65536")

    def run(
        self, name: str, N: int, D: int, threads: int, device: str, seconds: float, **settings: str
    ) -> Result:
        contender = CONTENDERS[name]
        if device == "cpu" and (lack := out_of_reach(contender, N, D)):
            return Result(note=lack)
        print(f"{name}, N = {N}, D = {D}, threads: {threads}", file=sys.stderr)
        python = self.peers_python if contender.packages else sys.executable
        arguments = map(str, (name, N, D, threads, device, seconds))
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | settings
        environment.pop("TORCHDYNAMO_DISABLE", None)
        try:
            done = subprocess.run(
                [python, str(WORKER), *arguments],
                env=environment,
                capture_output=True,
                timeout=self.cut_off,
            )
        except subprocess.TimeoutExpired as expired:
            return read(expired.stdout or b"", f"cut off after {self.cut_off:g} s")
        errors = done.stderr.decode()
        if done.returncode:
            print(errors, file=sys.stderr)
        return read(done.stdout, f"failed: {(errors.splitlines() or ['ended'])[-1][:80]}")


def out_of_reach(contender: Contender, N: int, D: int) -> str:
    tile = 4 * N * N * D
    if contender.tiles * tile < available_bytes():
        return ""
    return f"cannot run ({tile / 1e9:.0f} GB a tile)"


def available_bytes() -> int:
    return 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])


def read(printed: bytes, note: str) -> Result:
    turns = [json.loads(line) for line in printed.splitlines() if line.startswith(b"{")]
    kept = turns[1:] or turns  # the first warms up
    return Result(
        seconds=[turn["seconds"] for turn in kept],
        limits=[turn["limits"] for turn in kept],
        bytes=max((turn["bytes"] for turn in turns), default=0),
        note=note,
    )


# Report

Section = tuple[str, list[Target]]


def times(bench: Bench) -> Section:
    texts = [
        TIMES.format(
            ranks=RANKS, seconds=bench.seconds, rows=CHECKED_ROWS, compiled_rows=COMPILED_ROWS
        )
    ]
    targets = []
    for N, D in bench.sizes:
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
        header = ("", *map(threads_in_words, THREADS), "MiB")
        texts.append(f"### N = {N:,}, D = {D:,}\n\n{limit_in_words(found, N, D)}\n")
        texts.append(table(header, rows))
        targets += [
            Target(
                f"{CONTENDERS[name].title}, N = {N:,}, D = {D:,}, {threads_in_words(threads)}",
                WANTED_OF_BLOCK if CONTENDERS[name].ranks > 1 else WANTED[N, D],
                median(result.ratios("fp32")),
                at_most=True,
            )
            for (name, threads), result in found.items()
            if name in ("multi_rbf", "imq", "block", "block_imq") and result.seconds
        ]
    return "\n".join(texts), targets


def threads_in_words(threads: int) -> str:
    return "one thread" if threads == 1 else f"{threads} threads"


def limit_in_words(found: dict[tuple[str, int], Result], N: int, D: int) -> str:
    parts = []
    for threads in THREADS:
        seconds = [
            limits["fp32"]
            for (name, used), result in found.items()
            if used == threads and CONTENDERS[name].ranks == 1
            for limits in result.limits
        ]
        if seconds:
            rate = 4 * N * N * D / median(seconds) / 1e9
            parts.append(
                f"{1000 * median(seconds):,.2f} ms with {threads_in_words(threads)} "
                f"({rate:,.0f} billion operations a second)"
            )
    return f"The two products take {' and '.join(parts)}."


def growth(bench: Bench) -> Section:
    peaks = {N: bench.peak("multi_rbf", N, D).bytes for N, D in GROWTH}
    rows = [
        (f"{N:,}", short(peak / 2**20), figure(peak / 1024 / N), figure(peak / (4 * N * N)))
        for N, peak in peaks.items()
    ]
    header = ("N, with D = 128", "MiB", "KiB a code", "over an [N, N] matrix")
    last, before = peaks[8192], peaks[4096]
    target = Target("memory, N = 8,192 over N = 4,096", 2.1, last / before, at_most=True)
    return GROWTH_TEXT + table(header, rows), [target]


def on_device(bench: Bench) -> Section:
    if not torch.cuda.is_available():
        return NO_DEVICE, []
    texts, targets = [DEVICE_TEXT.format(device=torch.cuda.get_device_name())], []
    for N, D in DEVICE_SIZES:
        found = {name: bench.times(name, N, D, CORES, "cuda") for name in DEVICE_CONTENDERS}
        rows = [
            (CONTENDERS[name].title, result.cell("tf32"), result.cell("bf16"), result.memory())
            for name, result in found.items()
        ]
        header = ("", "over tf32", "over bf16", "MiB")
        texts += [f"### N = {N:,}, D = {D:,} on the GPU\n", table(header, rows)]
        for name, blocked in zip(ON_DEVICE, ("multi_rbf", "imq"), strict=True):
            fused, plain = found[name], found[blocked]
            if fused.seconds and plain.seconds:
                what = f"{CONTENDERS[name].title}, N = {N:,}, D = {D:,}"
                ratio = median(fused.ratios("tf32"))
                share = median(fused.seconds) / median(plain.seconds)
                targets += [
                    Target(f"{what}, over tf32", WANTED_OF_TRITON, ratio, at_most=True),
                    Target(f"{what}, over the blocked path", 1, share, at_most=True),
                ]
    return "\n".join(texts), targets


def main() -> None:
    every = [name for name in CONTENDERS if name not in ON_DEVICE]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two sizes and fewer turns")
    parser.add_argument("--only", help=f"some of {','.join(every)}")
    parser.add_argument("--peers-python", default=sys.executable, help="a Python with the peers")
    parser.add_argument("--write", action="store_true", help=f"save as {DOC.relative_to(ROOT)}")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else every
    if unknown := set(names) - set(every):
        parser.error(f"--only {','.join(unknown)}: choose from {','.join(every)}")
    if args.write and (args.quick or args.only):
        parser.error("--write saves whole runs: leave out --quick and --only")

    packages = sorted(set(chain(*(CONTENDERS[name].packages for name in every))))
    theirs = installed(args.peers_python, packages)
    lacking = [name for name in names if set(CONTENDERS[name].packages) - set(theirs)]
    bench = Bench(
        tuple(name for name in names if name not in lacking), args.peers_python, args.quick
    )
    parts = [times]
    if "multi_rbf" in names:
        parts.append(growth)
    if not args.only:
        parts.append(on_device)
    sections = [part(bench) for part in parts]

    versions = installed(sys.executable, ("torch",)) | theirs
    head = HEAD.format(install=" ".join(packages), machine=machine(versions))
    if lacking:
        titles = ", ".join(CONTENDERS[name].title for name in lacking)
        head += f"\nNot measured, since their packages are not installed: {titles}.\n"
    publish(head, sections, DOC if args.write else None)


if __name__ == "__main__":
    main()
