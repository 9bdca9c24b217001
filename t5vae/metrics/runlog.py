"""What a run tells: metrics.jsonl (the truth), a line or a bar for people, a full log."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from t5vae.cluster.scheduler import job_id
from t5vae.common.errors import DISK_FULL, UserError, first_line
from t5vae.common.files import read_records, write_records, write_whole
from t5vae.common.progress import process_seconds
from t5vae.common.records import finite
from t5vae.common.storage import WEATHER, patiently
from t5vae.config import Config
from t5vae.metrics.reading import METRICS
from t5vae.metrics.trackers import Tables, Trackers


class Findings(Protocol):
    """What an evaluation in mid-run found; as text the gist of it.

    Attributes:
        figures: for metrics.jsonl.
        tables: texts.
    """

    @property
    def figures(self) -> dict[str, float]: ...

    @property
    def tables(self) -> Tables: ...


class Terminal(Console):
    """Where lines for people go. A run outlives those who read them, as `tee` on Ctrl-C."""

    def on_broken_pipe(self) -> None:  # rich's own ends the program
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


class RunLog:
    """Rank 0's voice; on the other ranks every method is silent.

    Args:
        config: the run's, which the trackers are told too.
        enabled: whether this is rank 0.
    """

    def __init__(self, config: Config, *, enabled: bool):
        self.enabled = enabled
        self.path = config.run_dir / METRICS
        self.last_step = config.train.steps
        self.trackers = Trackers(config, self.say)
        terms = config.objective.computed.items()
        self.shown = {
            "loss": "loss {:.3f}",
            "reconstruction": "rec {:.3f}",
            **{name: term.shown for name, term in terms if term.shown},
            "grad_norm": "grad {:.2f}",
            "tokens_per_second": "{:,.0f} tok/s",
            "mfu": "mfu {:.1%}",
        }
        self.console = Terminal(stderr=True)
        self.bar: Progress | None = None
        self.began: tuple[float, int] | None = None
        self.checkpoint = 0
        self.saves: dict[str, float] = {}
        self.unwritten = ""
        self.whole: int | None = None  # bytes of whole lines, where writing more has failed
        self.waits = False

    def drop_after(self, step: int) -> None:
        """Drop the lines past a checkpoint, atomically: their steps will be done again.

        Raises:
            UserError: if the lines are damaged, or cannot be read or written.
            StorageError: if the storage failed for minutes.
        """
        if not self.enabled:
            return
        lines = read_records(self.path)
        steps = [finite(line.get("step")) for line in lines]
        if None in steps:
            raise UserError(f"{self.path} is damaged: it has lines without a step")
        kept = [line for line, at in zip(lines, steps, strict=True) if at <= step]
        try:
            if patiently(self.path.exists, str(self.path)):
                patiently(lambda: write_records(self.path, kept), str(self.path))
        except OSError as error:
            raise self._unwritable(error) from None

    def say(self, text: str) -> None:
        """One line for people, above the bar if there is one."""
        if self.enabled:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def attempt(self, number: int, health: str | None) -> None:
        """Which start of the run this is, and on what."""
        job = job_id()
        if number > 1 or job:
            self.say(f"attempt {number}" + (f", job {job}" if job else ""))
        if health:
            self.say(health)
        self.trackers.facts["attempt"] = number

    def steps(self, after: int) -> Iterator[int]:
        """The numbers of the steps after one, from 1 on, until the run's last; told as they pass.

        Args:
            after: steps done.
        """
        for step in range(after + 1, self.last_step + 1):
            yield step
            if self.bar is not None:
                self.bar.update(self.task, completed=step)

    def start(self, step: int, summary: str) -> None:
        """Begin after a step: say what is trained, start the trackers and, on a terminal, a bar."""
        if not self.enabled:
            return
        self.say(summary)
        self.checkpoint = step
        self.began = time.monotonic(), step
        self.trackers.start(step)
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("spent,"),
                TimeRemainingColumn(),
                TextColumn("left"),
                TextColumn("{task.description}"),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=self.last_step, completed=step)
            self.bar.start()

    def step(
        self, step: int, figures: dict[str, Any], findings: Findings | None, event: str | None
    ) -> None:
        """A step: its line of metrics, what an evaluation after it found, and what went wrong.

        Args:
            step: its number.
            figures: of it, `position` among them.
            findings: of the evaluation, if there was one.
            event: what is to be told of the step, if there is anything.
        """
        position = figures.pop("position")
        record = {"step": step, **figures, **(findings.figures if findings else {})}
        self.metrics(record | ({"event": event, "position": position} if event else {}))
        if findings:
            self.say(f"step {step:,}: {findings}")
            self.tables(step, findings.tables)
        if event:
            self.say(f"step {step:,}: {event} (the batch from position {position:,})")

    def metrics(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl and show the gist of it."""
        if not self.enabled:
            return
        common = {"steps": self.last_step, "time": time.time(), "checkpoint": self.checkpoint}
        record, self.saves = {**record, **common, **self.saves}, {}
        self.unwritten += _line(record)
        self._write()
        gist = "  ".join(form.format(record[k]) for k, form in self.shown.items() if k in record)
        if self.bar is not None:
            self.bar.update(self.task, description=gist)
        else:
            self.say(
                f"step {record['step']:>7,}/{self.last_step:,}  {gist}{self._times(record['step'])}"
            )
        self.trackers.metrics(record)

    def _times(self, step: int) -> str:
        """Since this process began, and until the end if it goes on as fast as since its start."""
        began, first = self.began or (0.0, step)
        if step == first:
            return ""
        left = (time.monotonic() - began) / (step - first) * (self.last_step - step)
        return f"  {_duration(process_seconds())} spent, {_duration(left)} left"

    def stopped(self, step: int, reason: str) -> None:
        """Why the run ends before its last step."""
        self.say(f"{reason}: saved at step {step:,}; the same command goes on from there")

    def tables(self, step: int, tables: Tables) -> None:
        """Write what the model made of texts to samples/, and hand it to the trackers."""
        if not self.enabled:
            return
        folder = self.path.parent / "samples"
        text = json.dumps({"step": step, **tables}, ensure_ascii=False, indent=1)
        try:
            folder.mkdir(exist_ok=True)
            write_whole(folder / f"step-{step:08d}.json", text + "\n")
        except OSError as error:
            why = first_line(error)
            self.say(f"the texts of step {step:,} could not be written to {folder}: {why}")
        self.trackers.tables(step, tables)

    def _write(self) -> None:
        """Append what is unwritten, no half line; where there is no room, or the storage fails, it
        is kept until there is.

        Raises:
            UserError: if the file cannot be written for another reason.
        """
        try:
            if self.whole is None:
                self.whole = self._size()
            else:
                self._cut_half_lines(self.whole)
            with open(self.path, "a") as file:
                file.write(self.unwritten)
            self.unwritten, self.whole, self.waits = "", None, False
        except OSError as error:
            if error.errno not in WEATHER.union(DISK_FULL):
                raise self._unwritable(error) from None
            if self.whole is not None:
                with suppress(OSError):  # before the next line is written, it is tried again
                    self._cut_half_lines(self.whole)
            if not self.waits:
                what = "room on the disk" if error.errno in DISK_FULL else "its storage"
                self.say(f"{self.path} waits for {what}: {first_line(error)}")
            self.waits = True

    def _cut_half_lines(self, whole: int) -> None:
        if self._size() > whole:
            os.truncate(self.path, whole)

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write {self.path}: {first_line(error)}; once that is mended, the same command "
            "goes on"
        )

    def saved(self, text: str, *, step: int, seconds: float, stall: float) -> None:
        """Tell of a checkpoint; the next line of metrics has its times.

        Args:
            text: for people.
            step: of the checkpoint.
            seconds: that the save took.
            stall: that training waited for it.
        """
        self.checkpoint = step
        self.say(text)
        self.saves = {"checkpoint_seconds": seconds, "checkpoint_stall": stall}

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        if self.unwritten:
            self._write()
        if self.unwritten:
            lost = len(self.unwritten.splitlines())
            self.say(f"{self.path} lacks the last lines, {lost:,} of them")
        self.trackers.close()


def _duration(seconds: float) -> str:
    """As 1:05, or 2:01:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _line(record: dict[str, Any]) -> str:
    """A record as JSON, which knows no NaN."""
    known = {k: v if isinstance(v, str) or math.isfinite(v) else None for k, v in record.items()}
    return json.dumps(known) + "\n"
