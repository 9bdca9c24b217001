"""Measure how fast `shards` loads, starts and builds and how much it stores, beside its peers.

    python benchmarks/shards.py --quick --only limit,t5vae --data DIR   # DIR keeps the data
    python benchmarks/shards.py --peers-python PEERS/bin/python --write

Contenders take turns, each in a process of its own (`_contenders.py`), so that a noisy machine
hits all alike; what is printed are medians of several turns. Ratios are taken turn by turn.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
from _contenders import WEBDATASET_ROWS
from _data import (
    MAX_LENGTH,
    PIECES,
    generated_lines,
    make_billion,
    make_sequences,
    stored_bytes,
    write_lines,
)
from _report import Block, Page, Target, figure, installed, output, ratios, say, table
from _timing import cpu_seconds
from tokenizers import Encoding, Tokenizer

CONTENDERS = Path(__file__).with_name("_contenders.py")
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

PEERS = {"webdataset": "webdataset", "mosaic": "mosaicml-streaming", "litdata": "litdata"}
SECTIONS = ("limit", "t5vae", *PEERS, "start", "build")


@dataclass(frozen=True)
class Loader:
    """A contender in one of its ways, or in several that share its time."""

    title: str
    name: str
    ways: tuple[dict[str, Any], ...] = ({},)
    within: str = ""
    """The folder of the data to load from."""


def ranks(world_size: int, *numbers: int) -> tuple[dict[str, Any], ...]:
    return tuple({"world_size": world_size, "rank": rank} for rank in numbers)


LIMIT = "the limit: memory-mapped arrays, shuffled each epoch"
PLAIN = "a plain gather: an index matrix, one permutation"
ALONE = "`shards`, one rank"
OF_8 = "`shards`, a rank of 8"
OF_64 = "`shards`, a rank of 64"
BILLION = "of a billion sequences"
LARGE_8, LARGE_64 = f"{OF_8}, {BILLION}", f"{OF_64}, {BILLION}"
RECORDS = "WebDataset, an array a sequence"
RAW = "WebDataset, raw bytes a sequence"
LOADERS = [
    Loader(LIMIT, "limit"),
    Loader("the same, one permutation drawn beforehand", "limit", ({"fresh": False},)),
    Loader(PLAIN, "limit", ({"plain": True},)),
    Loader(ALONE, "t5vae"),
    Loader(OF_8, "t5vae", ranks(8, 0, 3, 7)),
    Loader(OF_64, "t5vae", ranks(64, 0, 21, 63)),
    Loader(LARGE_8, "t5vae", ranks(8, 0, 3, 7), "billion"),
    Loader(LARGE_64, "t5vae", ranks(64, 0, 21, 63), "billion"),
    Loader(
        "`shards`, one rank, sorted by length, micro batches of 128",
        "t5vae",
        ({"sort_by_length": True, "micro_batch_size": 128},),
    ),
    Loader(RECORDS, "webdataset"),
    Loader(RAW, "webdataset", ({"member": "bin"},)),
    Loader("MosaicML Streaming, raw bytes a sequence", "mosaic"),
    Loader("LitData, an array a sequence", "litdata"),
]
TITLES = {
    "limit": "memory-mapped arrays",
    "t5vae": "`shards`",
    "webdataset": RECORDS,
    "mosaic": "MosaicML Streaming",
    "litdata": "LitData",
    "billion": f"`shards`, an index {BILLION}",
}

# Measurements


@dataclass(frozen=True)
class Bench:
    """What to measure: the data, the Python of each contender, and how thoroughly."""

    data: Path
    pythons: dict[str, str]
    quick: bool

    @property
    def seconds(self) -> float:
        return 0.4 if self.quick else 1.5

    @property
    def turns(self) -> int:
        return 5 if self.quick else 7

    @property
    def lengths(self) -> np.ndarray:
        return np.load(self.data / "limit" / "lengths.npy")

    def command(self, action: str, name: str, data: Path, *options: str) -> list[str]:
        return [self.pythons[name], str(CONTENDERS), action, name, str(data), *options]

    def serve(self, loader: Loader, way: dict[str, Any]) -> list[str]:
        return self.command("serve", loader.name, self.data / loader.within, json.dumps(way))

    def prepare(self) -> None:
        """Make the data that are not there yet."""
        self.data.mkdir(parents=True, exist_ok=True)
        if not (self.data / "limit").exists():
            make_sequences(self.data, generated_lines(2**20 if self.quick else 2**21))
        if not (self.data / "billion").exists():
            make_billion(self.data)
        for name in self.pythons:
            if not (self.data / name).exists():
                subprocess.run(self.command("write", name, self.data), check=True)

    def rates(self) -> dict[str, list[float]]:
        """Sequences per second of CPU of each loader, turn by turn."""
        loaders = [loader for loader in LOADERS if loader.name in self.pythons]
        found: dict[str, list[float]] = {loader.title: [] for loader in loaders}
        with ExitStack() as stack:
            workers = {
                loader.title: [
                    stack.enter_context(Worker(self.serve(loader, way))) for way in loader.ways
                ]
                for loader in loaders
            }
            for turn in range(self.turns + 1):
                for title, ways in workers.items():
                    rows, cpu = np.sum([way.load(self.seconds / len(ways)) for way in ways], axis=0)
                    if turn:  # the first warms up
                        found[title].append(rows / cpu)
        return found

    def starts(self) -> dict[str, tuple[float, float]]:
        """Seconds to the first batch, and bytes of memory for it, in a new process."""
        names = {name: self.data for name in self.pythons} | {"billion": self.data / "billion"}
        found = {}
        for title, data in names.items():
            command = self.command("start", "t5vae" if title == "billion" else title, data)
            runs = [json.loads(output(command)) for _ in range(1 if self.quick else 3)]
            seconds, size = (median(run[key] for run in runs) for key in ("seconds", "bytes"))
            found[title] = seconds, size
        return found

    def builds(self) -> tuple[int, list[float], list[float]]:
        """How many lines; seconds of CPU to build them and only to tokenize them, turn by turn."""
        import shards

        lines = generated_lines(2**18 if self.quick else 2**19, seed=1)
        few = write_lines(self.data / "few.txt", lines[:1000])
        source = write_lines(self.data / "more.txt", lines)
        out, tokenizer = self.data / "built", self.data / "vocabulary" / "tokenizer"

        def build(source: Path) -> float:
            before = cpu_seconds()
            shards.build(source, out, tokenizer=tokenizer, max_length=MAX_LENGTH, workers=1)
            cpu = cpu_seconds() - before
            shutil.rmtree(out)
            return cpu

        build(few)  # imports what a build needs
        built, tokenized = [], []
        for _ in range(1 if self.quick else 5):
            TwiceTokenizer.seconds = 0
            with patch("tokenizers.Tokenizer", TwiceTokenizer):
                cpu = build(source)
            built.append(cpu - TwiceTokenizer.seconds)
            tokenized.append(TwiceTokenizer.seconds)
        return len(lines), built, tokenized


class Worker:
    """A loader in a process of its own, which ends with the block."""

    def __init__(self, command: list[str]):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1)

    def load(self, seconds: float) -> tuple[int, float]:
        """Rows loaded, and the seconds of CPU that took."""
        assert self.process.stdin
        assert self.process.stdout
        print(seconds, file=self.process.stdin)
        told = json.loads(self.process.stdout.readline())
        return told["rows"], told["cpu"]

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


class TwiceTokenizer:
    """A `tokenizers.Tokenizer` that encodes each batch once more, and counts the CPU of that.

    So a build and tokenizing alone take turns batch by batch. Their difference is small, and that
    of two runs would drown in what else the machine does.
    """

    seconds = 0.0

    def __init__(self, json: str):
        self.used, self.alone = Tokenizer.from_str(json), Tokenizer.from_str(json)

    @classmethod
    def from_str(cls, json: str) -> "TwiceTokenizer":
        return cls(json)

    def encode_batch_fast(self, texts: list[str]) -> list[Encoding]:
        before = time.process_time()
        self.alone.encode_batch_fast(texts)
        TwiceTokenizer.seconds += time.process_time() - before
        return self.used.encode_batch_fast(texts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.used, name)


# Report


def loading(bench: Bench) -> Block:
    rates = bench.rates()

    def ratio(one: str, other: str) -> float:
        return median(ratios(rates[one], rates[other]))

    others = [title for title in (LIMIT, PLAIN, RECORDS) if title in rates]
    rows = [
        (title, *map(figure, (median(values), *(ratio(title, other) for other in others))))
        for title, values in rates.items()
    ]
    shares = {ALONE: 0.8, OF_8: 0.5, OF_64: 0.5, LARGE_8: 0.5, LARGE_64: 0.5}
    targets = [
        Target(f"loading, {title}: share of {limit}", share, ratio(title, other))
        for limit, other in (("the limit", LIMIT), ("a plain gather", PLAIN))
        for title, share in shares.items()
    ]
    if RECORDS in rates:
        what = f"loading, {ALONE}: times WebDataset"
        targets.append(Target(what, 100, ratio(ALONE, RECORDS)))
    of = ("of the limit", "of a plain gather", "times WebDataset")
    header = ("", "sequences / CPU s", *of[: len(others)])
    return Block("loading", table(header, rows), targets)


def storage(bench: Bench) -> Block:
    lengths = bench.lengths
    own = 2 * lengths.mean()
    sizes = {}
    for name in bench.pythons:
        if name == "webdataset":
            for member, title in (("npy", RECORDS), ("bin", RAW)):
                sizes[title] = stored_bytes(bench.data / name / member) / WEBDATASET_ROWS
        else:
            sizes[TITLES[name]] = stored_bytes(bench.data / name) / len(lengths)
    rows = [(title, f"{size:,.1f}", f"{size / own:,.2f}") for title, size in sizes.items()]
    what = "storage, `shards`: over the tokens' own bytes"
    target = Target(what, 1.1, sizes[TITLES["t5vae"]] / own, at_most=True)
    return Block("storage", table(("", "bytes a sequence", "over the tokens"), rows), [target])


def start(bench: Bench) -> Block:
    starts = bench.starts()
    rows = [
        (TITLES[name], f"{s:.2f}", f"{size / 2**20:,.0f}") for name, (s, size) in starts.items()
    ]
    seconds, _ = starts["billion"]
    what = "start, a billion sequences: seconds to the first batch"
    target = Target(what, 1, seconds, at_most=True)
    return Block("start", table(("", "seconds", "MiB"), rows), [target])


def build(bench: Bench) -> Block:
    lines, built, tokenized = bench.builds()
    rest = [whole - alone for whole, alone in zip(built, tokenized, strict=True)]
    rows = [
        (title, *(figure(lines / of(seconds)) for of in (median, max, min)))
        for title, seconds in (
            ("`shards.build`", built),
            ("`encode_batch_fast` alone", tokenized),
            ("the difference", rest),
        )
    ]
    target = Target("build, all but tokenizing: lines / CPU s", 200_000, lines / median(rest))
    return Block("build", table(("", "lines / CPU s", "least", "most"), rows), [target])


def main() -> None:
    quick = "fewer sequences and turns"
    page = Page(__doc__, "benchmarks/shards.md", quick=quick, only=SECTIONS)
    page.add_argument("--data", type=Path, help="a folder to keep the data in (else: temporary)")
    page.add_argument("--peers-python", default=sys.executable, help="a Python with the peers")
    args = page.options()

    versions = installed("numpy", "torch", "tokenizers")
    theirs = installed(*PEERS.values(), python=args.peers_python)
    pythons = {name: sys.executable for name in ("limit", "t5vae")}
    for name, package in PEERS.items():
        if name in args.only and package not in theirs:
            say(f"{name} is skipped; to have it: {args.peers_python} -m pip install {package}")
        elif name in args.only:
            pythons[name] = args.peers_python
            versions[package] = theirs[package]

    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(args.data or Path(temporary), pythons, args.quick)
        bench.prepare()
        parts = [loading, storage]
        parts += [part for part in (start, build) if part.__name__ in args.only]
        blocks = [part(bench) for part in parts]
        lengths = bench.lengths
    data = (
        f"{len(lengths):,} lines of {lengths.mean():.1f} tokens (standard deviation "
        f"{lengths.std():.1f}, at most {lengths.max()}) out of a vocabulary of {PIECES:,}."
    )
    page.publish([Block("data", data), *blocks], versions)


if __name__ == "__main__":
    main()
