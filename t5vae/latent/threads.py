"""How many threads a call of the model takes on a CPU: one, or all that torch was given.

More threads wait for the last of them at every operation. Beside a busy neighbour that one may
come late by milliseconds, and two threads are then many times slower than one; on idle cores they
are nearly twice as fast. Neighbours come and go, so real calls are timed, both ways.
"""

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from statistics import median

import torch

from t5vae.common.cpus import cpus

Timings = dict[int, deque[float]]
"""Of each number of threads, what a unit of size took in the latest calls, in seconds."""
KEPT = 3  # so that one outlier does not decide
SHORT = 0.02
"""A call that one thread does in so many seconds is left to it: others have little to win there."""
REPAID = 20
"""What a try of the slower way lost is repaid by this many times as much work: 5 % are lost."""


class Threads:
    """Chooses for calls of one model, from what it timed.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock, self.cpus = clock, cpus()
        self.timings: dict[tuple[str, int, int], Timings] = {}
        self.alone_is_faster = True  # as last compared; believed of calls that are not yet
        self.debt = 0.0  # seconds of work until the slower way is tried again

    @contextlib.contextmanager
    def __call__(self, job: str, size: int, device: torch.device) -> Iterator[None]:
        """Time a call, in which torch has the threads that were chosen, and after it all again.

        Args:
            job: what is done; calls are compared with those of the same job and a similar size.
            size: how much of it.
            device: where; on an accelerator nothing is changed.
        """
        given = torch.get_num_threads()
        most = min(given, self.cpus)
        if device.type != "cpu" or given == 1:
            yield
            return
        # Time is not proportional to size: similar ones are within a factor of two.
        kind = job, size.bit_length(), most
        timings = self.timings.setdefault(kind, defaultdict(lambda: deque(maxlen=KEPT)))
        count = self._choose(timings, size, most)
        torch.set_num_threads(count)
        try:
            began = self.clock()
            yield
            seconds = self.clock() - began
        finally:
            torch.set_num_threads(given)
        timings[count].append(seconds / size)
        other = timings[most if count == 1 else 1]
        lost = max(0.0, seconds - median(other) * size) if other else 0.0
        self.debt = max(0.0, self.debt - seconds) + REPAID * lost

    def _choose(self, timings: Timings, size: int, most: int) -> int:
        alone, together = timings[1], timings[most]
        if len(alone) < 2 or min(alone) * size < SHORT:  # the first one may find things to set up
            return 1
        if together:
            self.alone_is_faster = median(alone) <= median(together)
        elif not self.debt:
            return most
        faster, slower = (1, most) if self.alone_is_faster else (most, 1)
        return faster if self.debt else slower
