"""32 ranks of gloo on one machine: one is lost, and the run goes on with 24.

They are forked by one process that has imported everything, so that each takes what it alone needs.
"""

import resource
import signal
from pathlib import Path

import pytest

import shards
from tests.launching import PATIENCE, exact_metrics, rank_starter, run_of, small_config, steps_saved
from tests.soak.reads import Reads, served

pytestmark = pytest.mark.soak

BATCH, STEPS, EVERY = 96, 12, 4
BEFORE, AFTER, VICTIM, LOST_IN = 32, 24, 17, 7


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """One epoch of all steps."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = (f"value_{i} = {i * 7919 % 1000}" for i in range(BATCH * STEPS))
    (folder / "lines.txt").write_text("\n".join(lines) + "\n")
    options = {"max_length": 24, "valid_fraction": 0, "block_size": 64}
    shards.build(folder / "lines.txt", folder / "dataset", tokenizer="train:300", **options)
    return folder / "dataset"


def test_32_ranks_lose_one_and_24_read_what_is_left_once(dataset, tmp_path):
    config = small_config(
        tmp_path,
        dataset,
        data={"shards": str(dataset), "global_batch_size": BATCH},
        optim={"name": "adamw"},
        train={"steps": STEPS, "timeout": PATIENCE},
        checkpoint={"every": EVERY, "keep_last": STEPS},
    )
    run, reached = run_of(config), tmp_path / "reached"
    starts = [Reads(world, tmp_path / str(world)) for world in (BEFORE, AFTER)]
    for start in starts:
        start.folder.mkdir()
    before, after = starts
    with rank_starter(tmp_path, OMP_NUM_THREADS="1") as start:
        stop = {"step": LOST_IN, "rank": VICTIM, "marker": str(reached)}
        ranks = start(BEFORE, config, record=str(before.folder), stop_at=stop)
        ranks.wait_until(lambda: reached.exists() and steps_saved(run) == [EVERY])
        ranks.send(signal.SIGKILL, VICTIM)
        codes = ranks.end()
        assert codes == [1] * VICTIM + [-signal.SIGKILL] + [1] * (BEFORE - VICTIM - 1)
        (line,) = ranks.errors()
        assert line.startswith(f"error: rank {VICTIM} of {BEFORE} on ")
        assert " is lost: " in line
        assert start(AFTER, config, record=str(after.folder)).end() == [0] * AFTER
    assert before.last == LOST_IN
    assert after.first == EVERY + 1
    read = served(starts)
    assert [*read] == [*range(1, STEPS + 1)]
    for step, of_ranks in read.items():
        assert len(of_ranks) == (BEFORE if step <= EVERY else AFTER)
        assert len({len(own) for own in of_ranks.values()}) == 1
    sequences = [one for of_ranks in read.values() for own in of_ranks.values() for one in own]
    assert sorted(sequences) == [*range(BATCH * STEPS)]
    assert len(exact_metrics(run)) == STEPS
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
    print(f"the largest process took {largest:,.0f} MiB, pages shared with others included")
