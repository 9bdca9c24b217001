"""The section of `gpu.py` in which a real run is killed and goes on; and what starts one."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from _gpu_worker import Bench, Part
from _launches import QUICKSTART, TOY, deepspeed
from _report import ROOT, Target, table

from t5vae.checkpoint.manifest import read_manifest
from t5vae.checkpoint.retention import list_checkpoints
from t5vae.metrics.reading import read_metrics

# Killed and resumed

STEPS, EVERY, KILLED = 160, 80, 90
SAME = ("loss", "reconstruction", "mmd", "eval/nats_per_token", "eval/exact_match")

RESUMED = """\
`deepspeed train.py` with `train.deterministic`, {steps} steps of `configs/quickstart.yaml`, an \
evaluation and a save every {every}: once in one go, without the launcher; and once killed, all of \
its processes at once, after step {killed}, and started again by the same command.

"""


class Launch:
    """`train.py` in one rank, started by `deepspeed` or alone; what it prints goes to a log."""

    def __init__(self, bench: Bench, name: str, *settings: str, by_deepspeed: bool = False):
        self.run, self.log = bench.scratch / name, bench.out / f"{name}.log"
        training = ("train.py", str(QUICKSTART), f"run.output_dir={self.run}", *settings)
        starter = deepspeed(1) if by_deepspeed else [sys.executable]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [*starter, *training],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def end(self) -> None:
        """Wait for it.

        Raises:
            RuntimeError: where it did not end well, with its last line.
        """
        if code := self.process.wait():
            *_, last = self.log.read_text().splitlines() or ["it printed nothing"]
            raise RuntimeError(f"a run ended with exit code {code}: {last}")

    def kill_after(self, step: int) -> int:
        """Kill all of its processes at once; returns the last step that was logged.

        Raises:
            RuntimeError: where it ended before.
        """
        while not (lines := metrics(self.run)) or lines[-1]["step"] < step:
            if self.process.poll() is not None:
                self.end()
                raise RuntimeError(f"a run ended before step {step}, too fast to be killed")
            time.sleep(0.01)
        for process in (*psutil.Process(self.process.pid).children(recursive=True), self.process):
            process.kill()
        self.process.wait()
        return metrics(self.run)[-1]["step"]


def metrics(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run) if (run / "metrics.jsonl").exists() else []


def resumed(bench: Bench) -> Iterator[Part]:
    """Two runs, of which one is killed: losses, figures and weights bit for bit."""
    precision = "bf16" if bench.on_gpu else "fp32"  # not the clock's choice, once for each
    settings = (
        *(TOY if bench.smoke else ()),
        *(f"data.shards={bench.lines}", "data.global_batch_size=64", "train.deterministic=true"),
        *(f"train.precision={precision}", "optim.muon_precision=fp32", f"train.steps={STEPS}"),
        *(f"checkpoint.every={EVERY}", f"eval.every={EVERY}", "log.every=1"),
        *("eval.sequences=100", "eval.decoded=16"),
    )
    whole = Launch(bench, "whole", *settings)
    killed = Launch(bench, "killed", *settings, by_deepspeed=True)
    last = killed.kill_after(KILLED)
    again = Launch(bench, "killed", *settings, by_deepspeed=True)
    whole.end()
    again.end()
    ours, theirs = metrics(killed.run), metrics(whole.run)
    off = {
        name: sum(a.get(name) != b.get(name) for a, b in zip(ours, theirs, strict=True))
        for name in SAME
    }
    off["weights and moments of the last checkpoint"] = hashes(killed.run) != hashes(whole.run)
    rows = [(name, str(int(count))) for name, count in off.items()]
    text = RESUMED.format(steps=STEPS, every=EVERY, killed=last)
    target = Target("killed and resumed: what differs from one go", 0, sum(off.values()), True)
    yield Part("table", text + table(("", "lines that differ"), rows), (target,))


def hashes(run: Path) -> list[str]:
    """Of the newest checkpoint's files."""
    newest = list_checkpoints(run / "checkpoints")[-1]
    return [file["sha256"] for file in read_manifest(newest)["files"].values()]
