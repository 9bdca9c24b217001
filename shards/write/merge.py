"""Merging: many runs into few, so that a bucket is read from few files however large a corpus is.

Without it every one of a terabyte's 65,000 buckets would open every one of its 15,000 runs.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from shards.write import spool as spools
from shards.write.spool import Run, Spool, bound, join_ranges, run_path, write_run
from shards.write.workers import Counts, Job, carry_out
from t5vae.common.progress import Advance

MOST_RUNS = 128  # of a spool that is read by buckets; a merge has so many open, two files each


@dataclass(frozen=True)
class Merge(Job):
    """Merge neighbouring runs, each read once from its beginning to its end; a task makes one."""

    title = "merged what was sorted"

    spool: Spool

    @property
    def tasks(self) -> int:
        return -(-len(self.spool.runs) // MOST_RUNS)

    @property
    def total(self) -> int:
        return self.spool.items

    def __call__(self, task: int, advance: Advance) -> Counts:
        spool = self.spool
        items = duplicates = 0
        with ExitStack() as stack:
            paths = spool.runs[task * MOST_RUNS :][:MOST_RUNS]
            runs = [stack.enter_context(Run(path, spool.kind)) for path in paths]
            append = stack.enter_context(write_run(run_path(self.folder, task, 0)))
            ranges = 1 + sum(run.bytes for run in runs) // spools.BUCKET_BYTES
            starts = [0] * len(runs)
            for number in range(ranges):
                end = bound(spool.span, number + 1, ranges)
                stops = [run.find(end, start) for run, start in zip(runs, starts, strict=True)]
                places = zip(runs, starts, stops, strict=True)
                bucket = join_ranges(
                    (run.read(start, stop) for run, start, stop in places), spool.kind, spool.dedupe
                )
                append(bucket)
                items, duplicates = items + len(bucket.items), duplicates + bucket.duplicates
                advance(len(bucket.items) + bucket.duplicates)
                starts = stops
        return {"items": items, "duplicates": duplicates}


def merge(spool: Spool, folder: Path, workers: int, *, keep: bool = False) -> tuple[Spool, int]:
    """A spool of the same items in at most MOST_RUNS runs.

    Args:
        spool: the spool; its runs are removed if they are merged.
        folder: whose name, and a number, the folders of merged runs have.
        workers: as of `carry_out`.
        keep: the runs of `spool`.

    Returns:
        The spool, and how many duplicates were left out.
    """
    level = duplicates = 0
    while len(spool.runs) > MOST_RUNS:
        merging = Merge(folder.with_name(f"{folder.name}-merged-{level}"), spool)
        done = carry_out(merging, workers)
        if level or not keep:
            spool.remove()
        runs = [run_path(merging.folder, task, 0) for task in range(len(done))]
        spool = replace(spool, runs=runs, items=sum(counts["items"] for counts in done))
        duplicates += sum(counts["duplicates"] for counts in done)
        level += 1
    return spool, duplicates
