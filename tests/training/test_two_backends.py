"""Tensors in one process group and bookkeeping in another: ranks lost in a collective of either.

As `python test_two_backends.py serve` it forks ranks as `_slow_saves.py` does, of which one leaves
the others alone in a collective.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from t5vae.cluster.agreement import all_sum
from t5vae.cluster.scheduler import host_name
from tests import launching
from tests.training import _slow_saves

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
WORLD = 3
LOST = 1
STEP = 3
# Where the rank is lost, and the functions that the others are in by then.
PLACES = {
    "codes": ("values", "everyone"),
    "gradients": ("backward", "all_reduce"),
    "agreement": ("agree", "all_sum"),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "SLOW_SAVES", __file__)
        folder = tmp_path_factory.mktemp("ranks")
        with launching.rank_starter(folder, PYTHONPATH=str(ROOT)) as starter:
            yield starter


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("codes", signal.SIGKILL),
        ("codes", signal.SIGSTOP),
        ("gradients", signal.SIGSTOP),
        ("agreement", signal.SIGKILL),
        ("agreement", signal.SIGSTOP),
    ],
)
def test_a_rank_that_is_lost_in_a_collective_of_either_group_is_named(
    start, write_config, place, number
):
    timeout = 5 if number == signal.SIGSTOP else 60
    options = ["data.global_batch_size=24", f"train.timeout={timeout}", "--debug"]
    ranks = start(WORLD, write_config(), *options, lost={"place": place, "number": number})
    others = [rank for rank in range(WORLD) if rank != LOST]
    assert ranks.end(*others, patience=90) == [1, 1], ranks.output()
    (line,) = ranks.errors(0) + ranks.errors(2)
    assert line.startswith(f"error: rank {LOST} of {WORLD} on {host_name()} is lost: ")
    seen = "".join(map(ranks.output, others))
    assert all(f", in {function}\n" in seen for function in PLACES[place]), seen
    ranks.kill()


def cross() -> None:
    """Enter collectives of both groups, in another order on one rank, as no single group allows."""
    rank, numbers = dist.get_rank(), torch.full((1000,), 1.0)
    if rank == 0:
        work = dist.all_reduce(numbers, async_op=True)
        (total,) = all_sum(rank)
    else:
        (total,) = all_sum(rank)
        work = dist.all_reduce(numbers, async_op=True)
    work.wait()
    assert total == sum(range(WORLD))
    assert (numbers == WORLD).all()


def lose(place: str, number: int) -> None:
    """Have this rank leave the others alone there, in the present step."""
    from t5vae.objective import Gathering
    from t5vae.training import feed, loop, step

    def leave(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), number)

    if place == "codes":
        step.start_gather = lambda z_BD, **_: Gathering(z_BD, None, None, None)
        Gathering.everyone = leave
    elif place == "gradients":
        loop.backward = leave
    else:
        feed.Feed.agree = leave


def run(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    from t5vae.training import loop

    wanted, begin_step = json.loads(os.environ["SLOW_SAVES"])["lost"], loop.begin_step

    def begin(step: int) -> None:
        begin_step(step)
        if step == STEP:
            cross()
            if dist.get_rank() == LOST:
                lose(**wanted)

    loop.begin_step = begin
    return main(arguments)


if __name__ == "__main__":
    slow_saves = _slow_saves.run
    _slow_saves.run = lambda arguments: run(slow_saves, arguments)
    sys.exit(_slow_saves.serve())
