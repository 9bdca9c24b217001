"""What a run tells: metrics.jsonl (the truth), a line or a bar for people, wandb, a full log."""

import atexit
import contextlib
import json
import logging
import math
import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shards.errors import DISK_FULL
from shards.records import read_records, write_records
from t5vae.config import Config
from t5vae.training.preemption import job_id
from t5vae.training.saving import Saved

METRICS = "metrics.jsonl"
SHOWN = {
    "loss": "loss {:.3f}",
    "reconstruction": "rec {:.3f}",
    "mmd": "mmd {:.5f}",
    "grad_norm": "grad {:.2f}",
    "tokens_per_second": "{:,.0f} tok/s",
}


class RunLog:
    """Rank 0's voice; on the other ranks every method is silent.

    Args:
        config: the run's.
        enabled: whether this is rank 0.
    """

    def __init__(self, config: Config, *, enabled: bool):
        self.enabled = enabled
        self.path = config.run_dir / METRICS
        self.steps = config.train.steps
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.saves: dict[str, float] = {}
        self.unwritten = ""
        self.wandb = _start_wandb(config) if enabled and config.log.wandb else None

    def drop_after(self, step: int) -> None:
        """Drop the lines past a checkpoint, atomically: their steps will be done again."""
        if not self.enabled or not self.path.exists():
            return
        write_records(self.path, [line for line in read_records(self.path) if line["step"] <= step])

    def say(self, text: str) -> None:
        """One line for people, above the bar if there is one."""
        if self.enabled:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def describe(self, facts: dict[str, Any]) -> None:
        """What is about to be trained, in one line."""
        self.say(
            f"{facts['parameters']:,} parameters, {facts['world_size']} ranks, "
            f"{facts['train_sequences']:,} sequences, {facts['epochs']} epochs in "
            f"{self.steps:,} steps"
        )

    def attempt(self, number: int, health: str | None) -> None:
        """Which start of the run this is, and on what."""
        job = job_id()
        if number > 1 or job:
            self.say(f"attempt {number}" + (f", job {job}" if job else ""))
        if health:
            self.say(health)
        self._to_wandb(lambda run: run.config.update({"attempt": number}, allow_val_change=True))

    def start(self, step: int) -> None:
        """Show the bar, where there is a terminal."""
        if self.enabled and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=self.steps, completed=step)
            self.bar.start()

    def advance(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def metrics(self, record: dict[str, float | int]) -> None:
        """Append one line to metrics.jsonl and show the gist of it."""
        if not self.enabled:
            return
        record, self.saves = {**record, **self.saves}, {}
        # JSON knows no NaN
        known = {k: v if math.isfinite(v) else None for k, v in record.items()}
        self.unwritten += json.dumps(known) + "\n"
        self._write()
        gist = "  ".join(form.format(record[k]) for k, form in SHOWN.items() if k in record)
        if self.bar is not None:
            self.bar.update(self.task, description=gist)
        else:
            self.say(f"step {record['step']:>7,}/{self.steps:,}  {gist}")
        self._to_wandb(lambda run: run.log(record, step=record["step"]))

    def _write(self) -> None:
        """Append what is unwritten; on a full disk it waits for room, and no half line stays."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a") as file:
                file.write(self.unwritten)
            self.unwritten = ""
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            if self.path.exists():
                os.truncate(self.path, size)
            self.say(f"{self.path} waits for room on the disk: {error.strerror}")

    def saved(self, saved: Saved) -> None:
        """Tell of a checkpoint; the next line of metrics has its times."""
        self.say(
            f"saved {saved.path} ({saved.bytes / 1e6:,.1f} MB in {saved.seconds:.2f} s, training "
            f"waited {saved.stall:.2f} s)"
        )
        self.saves = {"checkpoint_seconds": saved.seconds, "checkpoint_stall": saved.stall}

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        self._to_wandb(lambda run: run.finish())

    def _to_wandb(self, action: Callable[[Any], None]) -> None:
        """Do something with the wandb run, if there is one that answers.

        Its service is another process, which a signal to all of a job ends at once; what it then
        misses is in metrics.jsonl.
        """
        if self.wandb is None:
            return
        try:
            action(self.wandb)
        except Exception as error:  # wandb never stops training
            self.wandb = None
            self.say(f"wandb is off: {' '.join(str(error).split())}")
            atexit.register(_silence)  # before wandb's own exit handler, which fails for the same


def _silence() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    return read_records(folder / METRICS)


def _start_wandb(config: Config) -> Any:
    """A wandb run that survives restarts; None where wandb fails: it never stops training."""
    import wandb

    folder = config.run_dir
    id_file = folder / "wandb" / "run-id"
    try:
        id_file.parent.mkdir(exist_ok=True)
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        has_key = bool(wandb.api.api_key)
        return wandb.init(
            id=id_file.read_text(),
            resume="allow",
            mode="online" if has_key else "offline",
            dir=str(folder),
            project="t5vae",
            name=config.run.name,
            config=config.model_dump(mode="json"),
        )
    except (wandb.errors.Error, OSError) as error:
        print(f"wandb is off: {error}", file=sys.stderr)
        return None


class Stopwatch:
    """Time since it was made, and how much of it was spent waiting, in seconds."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before


@contextlib.contextmanager
def quiet_start(log_file: Path) -> Iterator[None]:
    """Send what DeepSpeed, torch and gloo say while they start to a file instead of the terminal.

    File descriptors 1 and 2 are redirected: some of it is printed by C++. An error still surfaces,
    since it is raised, not printed.
    """
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with open(log_file, "a") as file:
        file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in zip((1, 2), saved, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


def log_libraries_to(log_file: Path) -> None:
    """Send what libraries log from now on to a file, at every level they chose."""
    handler = logging.FileHandler(log_file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in ("DeepSpeed", "py.warnings", "shards", "transformers", "torch.distributed"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
