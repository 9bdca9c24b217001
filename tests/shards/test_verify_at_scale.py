"""Verifying many shards: work in proportion to them, memory of a few."""

import hashlib
import io
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from shards.format.blocks import BLOCK
from shards.format.index import Shard
from shards.read import verifier

END = bytes(2 * verifier.RECORD)  # a tar of no files
WHOLE = hashlib.sha256(END).hexdigest()


class Looked(list):
    """A list that counts how many of its items were looked at."""

    count = 0

    def __iter__(self):
        for item in super().__iter__():
            self.count += 1
            yield item


@pytest.fixture
def verify(monkeypatch):
    """Verify so many shards of no blocks, which lie in memory."""

    def run(shards: int, *, sha256: str = WHOLE, max_length: int = 16):
        size = {"bytes": len(END), "blocks": 0, "sequences": 0, "tokens": 0}
        index = SimpleNamespace(
            path="d",
            sha256="",
            shards=Looked(
                Shard(name=f"{number}.tar", split="train", sha256=sha256, **size)
                for number in range(shards)
            ),
            splits={"train": SimpleNamespace(sequences=0, length_histogram=[])},
            blocks=np.empty(0, BLOCK),
            max_length=max_length,
            store=SimpleNamespace(get=None, open=lambda name: io.BytesIO(END)),
        )
        monkeypatch.setattr(verifier, "open_index", lambda *_: index)
        monkeypatch.setattr(verifier, "_tokenizer", lambda _: ())
        monkeypatch.setattr(verifier, "refuse_replaced", lambda *_: None)
        return verifier.verify("d", workers=2), index.shards.count

    return run


def test_as_many_more_shards_that_are_not_what_was_written_are_as_much_more_work(verify):
    looked = {}
    for shards in (200, 400):
        report, looked[shards] = verify(shards, sha256="0" * 64)
        assert len(report.problems) == shards
        assert report.problems[1] == (
            "d/1.tar is not what was written (its sha256 differs), but its blocks are whole"
        )
    assert looked[400] == 2 * looked[200] <= 4 * 400


def test_a_histogram_is_kept_for_each_split_and_not_for_each_shard(verify, monkeypatch):
    monkeypatch.setattr(verifier, "CHUNK", 2**10)
    histogram = 8 * 2**16  # bytes
    tracemalloc.start()
    try:
        report, _ = verify(200, max_length=2**16 - 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.ok
    assert peak < 10 * histogram


def test_shards_are_handed_out_some_at_a_time_and_told_of_in_order(verify, monkeypatch):
    monkeypatch.setattr(verifier, "AT_ONCE", 7)
    report, _ = verify(30, sha256="0" * 64)
    assert [line.split()[0] for line in report.problems] == [f"d/{i}.tar" for i in range(30)]
