"""Progress of a build on standard error: a bar on a terminal, one line a stage elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def stage(title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show one stage of work.

    Args:
        title: what was done, once it is.
        total: how many items there are, if known.

    Yields:
        A function to call with the number of items just finished.
    """
    console = Console(stderr=True)
    begun = time.monotonic()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    done = 0

    def advance(items: int) -> None:
        nonlocal done
        done += items
        bar.advance(task, items)

    with bar:
        task = bar.add_task(title, total=total)
        yield advance
    items = f": {done:,}" if done else ""
    say(f"{title}{items} in {time.monotonic() - begun:.1f} s")


def say(line: str) -> None:
    """Print a line of progress."""
    Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)
