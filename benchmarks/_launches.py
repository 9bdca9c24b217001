"""How the benchmarks start runs: by the deepspeed launcher, and timed by what they print."""

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from _report import ROOT, say

from t5vae.cluster.process_group import free_port

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
ON_CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
"""The environment of ranks that share a machine's cores."""


def t5(**sizes: int) -> tuple[str, ...]:
    """Settings of the T5 inside."""
    return tuple(f"model.t5.{name}={size}" for name, size in sizes.items())


TOY = (*t5(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4), "model.latent_size=16")
T5_SMALL = t5(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8)
T5_BASE = t5(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)


def deepspeed(ranks: int) -> list[str]:
    """What starts a script on ranks of this machine."""
    port = ("--master_port", str(free_port()))
    launcher = (sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error")
    return [*launcher, "--num_accelerators", str(ranks), *port]


def build_shards(
    folder: Path, pieces: int, length: int, source: Path | None = None, form: str = "python"
) -> None:
    """By default lines of Python's standard library; unless they are there."""
    from shards import build  # needs packages that reading does not

    build(source, folder, format=form, tokenizer=f"train:{pieces}", max_length=length)


@dataclass(frozen=True)
class Launch:
    """What a launch printed, and when: seconds since the epoch, as files have them."""

    lines: list[tuple[float, str]]

    @classmethod
    def of(
        cls, title: str, ranks: int, environment: dict[str, str], script: Path, *arguments: str
    ) -> "Launch":
        """Start it, and wait for it; one that fails ends this process too."""
        say(title)
        process = subprocess.Popen(
            [*deepspeed(ranks), str(script), *arguments],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        lines = [(time.time(), line) for line in process.stdout]
        if process.wait():
            sys.exit("".join(line for _, line in lines))
        return cls(lines)

    def line(self, part: str) -> str:
        """The first that has it."""
        return next(line for _, line in self.lines if part in line)

    def step_seconds(self, first: int, last: int) -> float:
        """Of a step, between the lines that were logged of those two."""
        found = ((at, re.match(r"step +([\d,]+)(?![\d,:])", line)) for at, line in self.lines)
        at = {int(match[1].replace(",", "")): at for at, match in found if match}
        return (at[last] - at[first]) / (last - first)
