"""Progress of a build on standard error: a bar on a terminal, one line a stage elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import psutil
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

Advance = Callable[[int], None]
Unit = Literal["items", "bytes"]


@contextmanager
def stage(
    title: str, total: int | None = None, done: int = 0, unit: Unit = "items"
) -> Iterator[Advance]:
    """Show one stage of work.

    Args:
        title: what was done, once it is.
        total: how many items, or bytes, there are, if known.
        done: how many of them were done before.
        unit: what is counted.

    Yields:
        A function to call with the number of items just finished.
    """
    console = Console(stderr=True)
    begun = time.monotonic()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        _Counts(unit),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    finished = 0

    def advance(count: int) -> None:
        nonlocal finished
        finished += count
        bar.advance(task, count)

    with bar:
        task = bar.add_task(title, total=total, completed=done)
        yield advance
    seconds = time.monotonic() - begun
    counts = f": {_show(finished, unit)}" if finished else ""
    rate = f" ({_show(round(finished / seconds), unit)}/s)" if finished else ""
    say(f"{title}{counts} in {seconds:.1f} s{rate}")


def say(line: str) -> None:
    """Print a line of progress."""
    Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)


class _Counts(ProgressColumn):
    """How much is done, of how much, and how fast."""

    def __init__(self, unit: Unit):
        super().__init__(Column(no_wrap=True))
        self.unit = unit

    def render(self, task: Task) -> Text:
        total = f" of {_show(int(task.total), self.unit)}" if task.total else ""
        speed = f", {_show(int(task.speed), self.unit)}/s" if task.speed else ""
        return Text(f"{_show(int(task.completed), self.unit)}{total}{speed}")


def _show(count: int, unit: Unit) -> str:
    return decimal(count) if unit == "bytes" else f"{count:,}"


def process_seconds() -> float:
    """Since this process began, imports included."""
    return max(0.0, time.time() - psutil.Process().create_time())
