"""What ranks agree on of a step's batches. The tests start this file itself, once for each rank."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from shards import ShardStream
from t5vae.training.feed import Feed

WORLD, STEPS, ROWS = 2, 12, 60

pytestmark = pytest.mark.distributed


def feed_of(folder: Path, rank: int, world: int) -> Feed:
    options = {"global_batch_size": ROWS, "micro_batch_size": 15, "on_corrupt": "skip"}
    stream = ShardStream(folder / "data", seed=0, rank=rank, world_size=world, **options)
    split = SimpleNamespace(accumulation=ROWS // world // 15, ranks=world)
    return Feed(stream, split, lambda batch: 0.0, torch.device("cpu"))


def go(feed: Feed, steps: int) -> list[int]:
    """What is quarantined after each step."""
    told = []
    for _ in range(steps):
        feed.agree(feed.read())
        told.append(feed.figures()["quarantined"])
    return told


def counting_of(feed: Feed) -> list[list[list[list[bool]]] | None]:
    """Of each step, which rows of all ranks count."""
    found = (feed.agree(feed.read()).counting for _ in range(STEPS))
    return [of_step and [counting_WB.tolist() for counting_WB in of_step] for of_step in found]


def rank_main(rank: int, folder: Path) -> None:
    """A run, the same resumed after a half, and from a state that does not tell."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    whole, first = feed_of(folder, rank, WORLD), feed_of(folder, rank, WORLD)
    told = {"whole": go(whole, STEPS), "first": go(first, STEPS // 2)}
    for name in ("second", "old"):
        resumed, state = feed_of(folder, rank, WORLD), first.state_dict()
        if name == "old":
            del state["quarantined"]
        resumed.load_state_dict(state)
        told[name] = go(resumed, STEPS // 2)
    counting = counting_of(feed_of(folder, rank, WORLD))
    (folder / f"{rank}.json").write_text(json.dumps(told | {"counting": counting}))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def told(damaged_dataset, run_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "data").symlink_to(damaged_dataset)
    run_ranks(__file__, WORLD, folder)
    told, other = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD))
    assert told == other
    return told


def test_quarantined_rows_are_counted_once_over_ranks_and_through_a_resume(told, damaged_dataset):
    with ShardStream(damaged_dataset, seed=0, global_batch_size=ROWS, on_corrupt="skip") as stream:
        rows = [int((next(stream).weights == 0).sum()) for _ in range(STEPS)]
    expected = torch.tensor(rows).cumsum(0).tolist()
    assert expected[STEPS // 2 - 1] > 0
    assert told["whole"] == told["first"] + told["second"] == expected
    assert told["old"] == [each - expected[STEPS // 2 - 1] for each in expected[STEPS // 2 :]]


def test_all_ranks_know_which_rows_of_each_micro_batch_count(told, damaged_dataset):
    options = {"global_batch_size": ROWS, "micro_batch_size": 15, "on_corrupt": "skip"}
    streams = [
        ShardStream(damaged_dataset, seed=0, rank=rank, world_size=WORLD, **options)
        for rank in range(WORLD)
    ]
    for found in told["counting"]:
        expected = [
            [(next(stream).weights > 0).tolist() for stream in streams]
            for _ in range(ROWS // WORLD // 15)
        ]
        whole = all(row for micro in expected for rank in micro for row in rank)
        assert found == (None if whole else expected)
    assert any(told["counting"])
    for stream in streams:
        stream.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
