"""A profile of some steps: a trace to look at, and a table of where their time goes."""

import time
from collections.abc import Callable
from pathlib import Path

from torch.profiler import profile

from t5vae.common.kinds import TERMS
from t5vae.common.quiet import log_file_of, quiet_start

OPERATORS = 20  # rows of the second table


def phases() -> tuple[str, ...]:
    """Of a step, in its order, and of what follows some."""
    return ("data", "forward", *TERMS, "backward", "optimizer", "evaluation", "save")


class Profiler:
    """Profiles the steps that `train.profile` names into the run's `profile/`.

    Every rank writes `rank-00000.trace.json.gz`, for ui.perfetto.dev or chrome://tracing, and rank
    0 `steps.txt`: the phases of a step, and the operators that take longest. What it does itself
    slows these steps down.

    Args:
        steps: the first and the last, from 1; None for none.
        folder: the run's.
        rank: this process's.
        say: told where the files are.
    """

    def __init__(
        self,
        steps: tuple[int, int] | None,
        folder: Path,
        rank: int,
        say: Callable[[str], None],
    ):
        self.first, self.last = steps or (0, -1)
        self.folder = folder / "profile"
        self.log_file = log_file_of(folder, rank)
        self.rank, self.say = rank, say
        self.profile: profile | None = None
        self.step = 0

    def before(self, step: int) -> None:
        """A step follows, counted from 1."""
        if self.profile is None and self.first <= step <= self.last:
            self.profile, self.begin = profile(), step
            with quiet_start(self.log_file):
                self.profile.start()
            self.began = time.perf_counter()
        elif self.profile is not None and step == self.last + 1:
            self._finish(self.last)
        self.step = step

    def close(self) -> None:
        """The run ends."""
        if self.profile is not None:
            self._finish(self.step)

    def _finish(self, done: int) -> None:
        assert self.profile is not None
        seconds = time.perf_counter() - self.began
        with quiet_start(self.log_file):
            self.profile.stop()
        try:
            self._write(self.profile, done, seconds)
            self.say(f"profiled steps {self.begin:,} to {done:,}: {self.folder}/steps.txt")
        except OSError as error:
            self.say(f"the profile could not be written: {error}")
        self.profile = None

    def _write(self, found: profile, done: int, seconds: float) -> None:
        trace = self.folder / f"rank-{self.rank:05d}.trace.json.gz"
        self.folder.mkdir(exist_ok=True)
        with quiet_start(self.log_file):
            found.export_chrome_trace(str(trace))
        if self.rank == 0:
            text = table(found, self.begin, done, seconds)
            (self.folder / "steps.txt").write_text(text)


def table(found: profile, first: int, last: int, seconds: float) -> str:
    """Where the time of steps went, for people; milliseconds a step.

    A phase's time is that of the thread that runs the loop; on an accelerator, which works behind
    it, the operators' second column counts.

    Args:
        found: a profile that has ended.
        first, last: the steps it has seen.
        seconds: of all of them.
    """
    steps = last - first + 1
    whole = 1000 * seconds / steps
    averages = found.key_averages()
    spent = {event.key: event.cpu_time_total / 1000 / steps for event in averages}
    rows = [(name, spent[name]) for name in phases() if name in spent]
    rows.append(("other", whole - sum(time for _, time in rows)))
    lines = [
        f"steps {first:,} to {last:,}: {whole:,.2f} ms a step",
        "",
        f"{'phase':<12}{'ms':>12}{'share':>9}",
        *(f"{name:<12}{time:>12,.2f}{time / whole:>9.1%}" for name, time in rows),
        "",
        f"{'operator':<44}{'calls':>10}{'host ms':>12}{'device ms':>12}",
    ]
    operators = [event for event in averages if event.key not in phases()]
    operators.sort(
        key=lambda event: (event.self_device_time_total, event.self_cpu_time_total), reverse=True
    )
    for event in operators[:OPERATORS]:
        host = event.self_cpu_time_total / 1000 / steps
        device = event.self_device_time_total / 1000 / steps
        calls = event.count / steps
        lines.append(f"{event.key[:43]:<44}{calls:>10,.1f}{host:>12,.2f}{device:>12,.2f}")
    return "\n".join(lines) + "\n"
