"""Python's garbage is collected between steps alone, by all ranks at the same time.

A collection in the midst of a step on one rank makes all others wait for it, and one that looks
through all that torch, transformers and DeepSpeed have made takes half a second.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

FULL = 100
"""Steps from one collection of all that was made since the first step to the next."""


@contextmanager
def collected_between_steps() -> Iterator[Callable[[], None]]:
    """Collect only when asked to, and only what is made meanwhile; then as before.

    Yields:
        To be called after each step: it collects what was made since the last call, and each
        `FULL`-th time what stayed from calls before, too.
    """
    enabled = gc.isenabled()
    frozen_before = gc.get_freeze_count() > 1000  # Python 3.12 itself starts with some hundreds
    gc.collect()
    gc.freeze()
    gc.disable()
    calls = count(1)

    def collect() -> None:
        gc.collect(1 if next(calls) % FULL else 2)

    try:
        yield collect
    finally:
        if not frozen_before:
            gc.unfreeze()
        if enabled:
            gc.enable()
