"""mmd() over gloo ranks against one process on the whole batch.

The tests start this file itself, once for each of three ranks; two of them also form a group.
"""

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from t5vae.objective import mmd, start_gather

WORLD = 3
INPUTS, DIMENSIONS = 6, 4
OPTIONS = [
    {"kernel": kernel, "estimator": estimator, "prior": prior, "generator_seed": 5}
    for kernel, estimator, prior in product(
        ["rbf", "multi_rbf", "imq", "legacy"], ["u", "v"], ["normal", "sampled"]
    )
]
# Rows of each rank by name of the split; the weights of all rows, 1 where not named.
SPLITS = {
    "two equal": ([4, 4], {}),
    "two unequal": ([7, 2], {}),
    "two, one empty": ([0, 5], {}),
    "two with quarantined rows": ([3, 5], {0: 0, 4: 0, 7: 0}),
    "two with one real row": ([2, 2], {0: 0, 1: 0, 3: 0}),
    "three equal": ([4, 4, 4], {}),
    "three unequal": ([1, 6, 3], {}),
    "three longer than a chunk": ([600, 530, 3], {}),
    "three, one quarantined": ([2, 3, 2], {2: 0, 3: 0, 4: 0}),
    "three without a real row": ([1, 1, 1], {0: 0, 1: 0, 2: 0}),
}
COLLECTIVES = [
    name
    for name in dir(dist)
    if callable(getattr(dist, name))
    and re.match("all_|barrier|batch_|broadcast|gather|i?recv|i?send|reduce|scatter", name)
]


def whole_batch(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the small encoder, weights of the rows, and the encoder's weight, in fp64."""
    rows, named = SPLITS[name]
    generator = torch.Generator().manual_seed(sum(rows))
    x = torch.randn(sum(rows), INPUTS, generator=generator, dtype=torch.float64)
    weights = torch.ones(sum(rows))
    for row, weight in named.items():
        weights[row] = weight
    encoder = torch.randn(DIMENSIONS, INPUTS, generator=generator, dtype=torch.float64) / 3
    return x + 0.2, weights, encoder.requires_grad_()


def counted(collective: Callable, calls: list[str]) -> Callable:
    @functools.wraps(collective)
    def call(*args, **options):
        calls.append(collective.__name__)
        return collective(*args, **options)

    return call


def rank_main(rank: int, folder: Path) -> None:
    """What each rank runs: every case, its results written to a file."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=30),
    )
    calls: list[str] = []
    pair = dist.new_group([0, 1])
    for name in COLLECTIVES:
        setattr(dist, name, counted(getattr(dist, name), calls))

    results = []
    for split, (rows, _) in SPLITS.items():
        world = len(rows)
        if rank >= world:
            continue
        group = pair if world == 2 else None
        x, weights, encoder = whole_batch(split)
        x_b, weights_b = x.split(rows)[rank], weights.split(rows)[rank]
        for case, options in enumerate(OPTIONS):
            z_BD = x_b @ encoder.T
            calls.clear()
            if case % 2:  # the two forms of one thing
                pending = start_gather(z_BD, weights_B=weights_b, group=group)
                loss = pending.finish(**options)
            else:
                loss = mmd(z_BD, weights_B=weights_b, group=group, **options)
            forward = len(calls)
            (gradient,) = torch.autograd.grad(loss, encoder)
            backward = len(calls) - forward
            dist.all_reduce(gradient, group=group)
            results.append(
                {
                    "split": split,
                    "case": case,
                    "value": loss.item(),
                    "gradient": (gradient / world).tolist(),  # the engine's mean reduction
                    "forward": forward,
                    "backward": backward,
                }
            )
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Per split and case, what each of its ranks computed; one launch for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":  # elsewhere the loopback has another name
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(errors)[-3000:]
    found = {}
    for rank in range(WORLD):
        for result in json.loads((folder / f"{rank}.json").read_text()):
            found.setdefault((result["split"], result["case"]), []).append(result)
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_ranks_give_the_value_and_gradient_of_one_process_on_the_whole_batch(results, split):
    for case, options in enumerate(OPTIONS):
        x, weights, encoder = whole_batch(split)
        expected = mmd(x @ encoder.T, weights_B=weights, **options)
        (expected_gradient,) = torch.autograd.grad(expected, encoder)
        ranks = results[split, case]
        assert len(ranks) == len(SPLITS[split][0])
        for result in ranks:
            assert result["value"] == ranks[0]["value"]
            assert result["value"] == pytest.approx(expected.item(), rel=1e-5, abs=1e-7), options
            gradient = torch.tensor(result["gradient"], dtype=torch.float64)
            error = (gradient - expected_gradient).norm()
            assert error <= 1e-5 * expected_gradient.norm(), (options, error)


def test_fewer_than_two_real_rows_over_all_ranks_give_0_with_zero_gradient(results):
    for split in ("two with one real row", "three without a real row"):
        for case in range(len(OPTIONS)):
            for result in results[split, case]:
                assert result["value"] == 0
                assert not any(map(any, result["gradient"]))


def test_backward_calls_no_collective(results):
    everything = [result for ranks in results.values() for result in ranks]
    assert all(result["backward"] == 0 for result in everything)
    assert all(result["forward"] > 0 for result in everything)  # the count counts


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
