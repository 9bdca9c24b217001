"""Runs and bare loops as `train.py` starts and times them."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # `shards` is the package, not the script
from t5vae.cluster.process_group import free_port
from t5vae.cluster.ranks import Ranks
from t5vae.config import load_config
from t5vae.training.feed import open_feed
from t5vae.training.job import Job, resolve

ROOT = Path(__file__).parents[1]
BARE_LOOP = ROOT / "benchmarks" / "_bare_loop.py"
CONFIG = "configs/quickstart.yaml"
BUILD = ("--format", "python", "--tokenizer", "train:4096", "--max-length", "16")
REAL_BATCHES = 8
"""Real batches of a rank whose shapes and lengths the bare loop goes through."""


class Place(NamedTuple):
    """Where ranks run, and how."""

    title: str
    ranks: int
    environment: dict[str, str]
    settings: tuple[str, ...]
    saved: dict[str, tuple[str, ...]]
    """Models whose saves are timed, by what makes them another than the loop's."""


class Effort(NamedTuple):
    """How much is measured."""

    turns: int
    first: int
    """Steps of a run that warm up."""
    steps: int
    rounds: int
    starts: int
    saves: int


FULL = Effort(turns=4, first=10, steps=60, rounds=20, starts=3, saves=5)
QUICK = Effort(turns=1, first=10, steps=20, rounds=2, starts=1, saves=2)


def t5_sizes(width: int, layers: int) -> tuple[str, ...]:
    sizes = {"d_model": width, "d_kv": 64, "d_ff": 4 * width}
    sizes |= {"num_layers": layers, "num_heads": width // 64}
    return tuple(f"model.t5.{name}={size}" for name, size in sizes.items())


def on_cpu() -> Place:
    # Muon and a full batch would make a step of this size last for many seconds
    small = (*t5_sizes(512, 6), "optim.name=adamw", "data.global_batch_size=4")
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return Place("the CPU", 2, environment, (), {"quickstart": (), "T5-small": small})


def on_cuda() -> Place:
    """Every device of this machine, a T5-base each."""
    ranks = torch.cuda.device_count()
    settings = (*t5_sizes(768, 12), f"data.global_batch_size={512 * ranks}")
    title = f"{ranks} x {torch.cuda.get_device_name()}"
    return Place(title, ranks, {}, settings, {"T5-base": ()})


@dataclass(frozen=True)
class Launch:
    """What a launch printed, and when: seconds since the epoch, as files have them."""

    started: float
    lines: list[tuple[float, str]]

    def at(self, pattern: str) -> float:
        """When the first line came that begins so."""
        return next(at for at, line in self.lines if re.match(pattern, line))

    def steps(self) -> dict[int, float]:
        """When the line of each logged step came."""
        found = ((at, re.match(r"step +([\d,]+)(?![\d,:])", line)) for at, line in self.lines)
        return {int(match[1].replace(",", "")): at for at, match in found if match}


@dataclass(frozen=True)
class Bench:
    place: Place
    effort: Effort
    folder: Path

    @property
    def run_folder(self) -> Path:
        return self.folder / "run"

    @property
    def lengths(self) -> Path:
        return self.folder / "lengths.json"

    def settings(self, *more: str) -> list[str]:
        every = (f"data.shards={self.folder / 'shards'}", f"run.output_dir={self.run_folder}")
        return [CONFIG, *every, "checkpoint.every=0", "eval.every=0", *self.place.settings, *more]

    def job(self, rank: int = 0) -> Job:
        path, *settings = self.settings()
        ranks = Ranks(rank, self.place.ranks, rank, self.place.ranks, "127.0.0.1", 0)
        return resolve(load_config(ROOT / path, settings), ranks)

    def train(self, title: str, *settings: str) -> Launch:
        return self.launch(title, ROOT / "train.py", *self.settings(*settings))

    def bare(self, title: str, mode: str, steps: int, *settings: str) -> Launch:
        arguments = (mode, str(self.lengths), str(steps), *self.settings(*settings))
        return self.launch(title, BARE_LOOP, *arguments)

    def launch(self, title: str, script: Path, *arguments: str) -> Launch:
        print(title, file=sys.stderr)
        launcher = [Path(sys.executable).with_name("deepspeed"), "--log_level", "error"]
        ranks = ["--master_port", free_port(), "--num_accelerators", self.place.ranks]
        started = time.time()
        process = subprocess.Popen(
            [str(part) for part in (*launcher, *ranks, script, *arguments)],
            cwd=ROOT,
            env=os.environ | self.place.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        lines = [(time.time(), line) for line in process.stdout]
        if process.wait():
            sys.exit("".join(line for _, line in lines))
        return Launch(started, lines)

    def forget_run(self) -> None:
        shutil.rmtree(self.run_folder, ignore_errors=True)


def prepare(bench: Bench) -> None:
    """Build the shards unless they are there, and note the lengths of a few real batches."""
    shards = bench.folder / "shards"
    command = [str(Path(sys.executable).with_name("t5vae")), "shards", "build", *BUILD]
    subprocess.run([*command, "--out", str(shards)], check=True, stdout=sys.stderr)
    found = []
    for rank in range(bench.place.ranks):
        with open_feed(bench.job(rank), torch.device("cpu")).stream as stream:
            batches = [next(stream) for _ in range(REAL_BATCHES)]
        found.append([{"T": b.ids.shape[1], "lengths": b.lengths.tolist()} for b in batches])
    bench.lengths.write_text(json.dumps(found))
    bench.forget_run()
