"""Losses of the quickstart, step by step: `record.py [FILE]` writes them down.

With `--compare` the same runs are held against the file bit for bit, which only the machine and
the packages that wrote it can pass; `tests/test_golden.py` allows for others.
"""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOSSES = Path(__file__).with_name("losses.json")
SHARDS = ROOT / "tests/fixtures/v0.1/shards"
FIGURES = ("loss", "reconstruction", "mmd")
PACKAGES = ("torch", "deepspeed", "transformers", "numpy")

Losses = dict[str, list[float]]


@dataclass(frozen=True)
class Run:
    """So many steps, on so many processes."""

    ranks: int
    steps: int
    zero_stage: int = 1


RUNS = {
    "one rank": Run(1, 100),
    "two ranks": Run(2, 100),
    "two ranks, ZeRO stage 2": Run(2, 20, 2),
    "two ranks, ZeRO stage 3": Run(2, 20, 3),
}


def train(run: Run, folder: Path, *overrides: str, **environment: str) -> Losses:
    """The figures of every step, in full precision.

    Args:
        folder: to train in.
        overrides: of the configuration.
        environment: variables in place of this process's.
    """
    settings = {
        "data.shards": SHARDS,
        "data.global_batch_size": 32,
        "run.output_dir": folder,
        "train.steps": run.steps,
        "train.minutes": "null",
        "train.precision": "fp32",
        "optim.muon_precision": "fp32",
        "deepspeed.zero_stage": run.zero_stage,
        "checkpoint.every": 0,
        "eval.every": 0,
        "log.every": 1,
    }
    arguments = [*(f"{key}={value}" for key, value in settings.items()), *overrides]
    python = Path(sys.executable)
    options = {"num_accelerators": run.ranks, "master_port": _free_port(), "log_level": "error"}
    deepspeed = [python.with_name("deepspeed"), *(f"--{k}={v}" for k, v in options.items())]
    start = [python] if run.ranks == 1 else deepspeed
    launchers = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "SLURM_", "CROSS_")
    inherited = {name: v for name, v in os.environ.items() if not name.startswith(launchers)}
    fixed = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, ROOT / "train.py", ROOT / "configs/quickstart.yaml", *arguments],
        env={**inherited, **fixed, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"training failed:\n{done.stdout[-3000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines] for name in FIGURES}


def recorded(file: Path = LOSSES) -> dict[str, Losses]:
    """The figures of each of `RUNS`, as they were written down."""
    return json.loads(file.read_text())["runs"]


def difference(losses: Losses, expected: Losses) -> str:
    """Where two runs differ in any bit, in a line; empty where they do not."""
    pairs = [
        (step, name, was, now)
        for name in FIGURES
        for step, (was, now) in enumerate(zip(expected[name], losses[name], strict=True), 1)
        if was != now
    ]
    if not pairs:
        return ""
    step, name, was, now = min(pairs)
    return f"{len(pairs)} figures differ, the first at step {step}: {name} {was!r}, now {now!r}"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _cpu() -> str:
    found = Path("/proc/cpuinfo")
    lines = found.read_text().splitlines() if found.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _capability() -> str:
    import torch

    return torch.backends.cpu.get_cpu_capability()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=LOSSES)
    parser.add_argument(
        "--compare", action="store_true", help="Write nothing; exit with 1 if any bit differs."
    )
    options = parser.parse_args()
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, run) in enumerate(RUNS.items()):
            runs[name] = train(run, Path(folder) / str(number))
            print(f"{name}: {run.steps} steps", flush=True)
    if options.compare:
        expected = recorded(options.file)
        found = {name: difference(losses, expected[name]) for name, losses in runs.items()}
        for name, text in found.items():
            print(f"{name}: {text or 'the same bits'}")
        return int(any(found.values()))
    record = {
        "cpu": f"{_cpu()}, {_capability()}",
        "versions": {"python": platform.python_version(), **{n: version(n) for n in PACKAGES}},
        "runs": runs,
    }
    options.file.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
