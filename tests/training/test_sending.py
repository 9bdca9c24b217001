"""Batches on their way to an accelerator, of which this has only the streams' names."""

from types import SimpleNamespace

import torch

from shards import Batch, ShardStream
from t5vae.training.feed import Feed


class Stream:
    """Notes what is done on it."""

    def __init__(self, name: str, events: list[str]):
        self.name, self.events = name, events

    def __enter__(self):
        self.events.append(f"on {self.name}")

    def __exit__(self, *_):
        self.events.append(f"off {self.name}")

    def wait_stream(self, other):
        self.events.append(f"{self.name} waits for {other.name}")


def test_batches_are_copied_on_a_stream_of_their_own_for_which_the_device_waits(
    dataset, monkeypatch
):
    events: list[str] = []
    compute = Stream("compute", events)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: compute)
    monkeypatch.setattr(Batch, "to", lambda self, device: events.append("copy") or self)
    used = lambda self, stream: events.append(f"kept for {stream.name}")  # noqa: E731
    monkeypatch.setattr(Batch, "used_by", used)
    stream = ShardStream(dataset, seed=0, global_batch_size=16, micro_batch_size=8)
    feed = Feed(stream, SimpleNamespace(accumulation=2), lambda batch: 0.0, torch.device("cpu"))
    feed.copies = Stream("copies", events)
    assert len(feed.read()) == 2
    feed.close()
    copied = ["on copies", "copy", "copy", "off copies", "compute waits for copies"]
    assert events == [*copied, "kept for compute", "kept for compute"]
