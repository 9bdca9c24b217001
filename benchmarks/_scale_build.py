"""What a build opens to merge sorted runs and read them by buckets; for `scale.py`."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import _report  # noqa: F401  finds the packages

from shards.write import spool as spools
from shards.write.merge import merge
from shards.write.spool import SpoolWriter, open_spool

BUCKETS_BYTES = 4000  # so that a few texts a run are several buckets

_opened: list[str] = []
sys.addaudithook(lambda event, said: _opened.append(str(said[0])) if event == "open" else None)


def rows(counts: tuple[int, ...]) -> list[dict[str, int]]:
    """For numbers of runs of 20 texts: what is opened to merge them, and to read a bucket."""
    found = []
    spools.BUCKET_BYTES = BUCKETS_BYTES
    for runs in counts:
        with TemporaryDirectory() as home:
            folder = Path(home, "read")
            folder.mkdir()
            writer = SpoolWriter(folder, 0, "text", 0, True)
            for number in range(runs):
                writer.add([f"text {item}" for item in range(20 * number, 20 * number + 20)])
                writer.flush()
            spool = open_spool(folder, [writer.counts], "text", True)
            _opened.clear()
            merged, _ = merge(spool, folder, workers=1)
            of_merging = len([name for name in _opened if name.endswith((".rows", ".items"))])
            _opened.clear()
            for number in range(merged.buckets):
                merged.bucket(number)
            of_reading = len([name for name in _opened if name.endswith((".rows", ".items"))])
            found.append(
                {
                    "runs": runs,
                    "merging": of_merging,
                    "left": len(merged.runs),
                    "buckets": merged.buckets,
                    "reading": of_reading,
                    "before": runs * merged.buckets,
                }
            )
    return found
