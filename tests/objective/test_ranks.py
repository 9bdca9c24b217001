"""mmd() over gloo ranks against one process on the whole batch.

The tests start this file itself, once for each of four ranks; one and two of them also form groups.
"""

import json
import sys
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from t5vae.objective import mmd, mmd_of, rows_that_count, start_gather

WORLD = 4
INPUTS, DIMENSIONS = 6, 4
OPTIONS = [
    {"kernel": kernel, "estimator": estimator, "prior": prior, "generator_seed": 5}
    for kernel, estimator, prior in product(
        ["rbf", "multi_rbf", "imq", "legacy"], ["u", "v"], ["normal", "sampled", "uniform"]
    )
]
# Rows of each rank by name of the split; the weights of all rows, 1 where not named.
SPLITS = {
    "one": ([8], {}),
    "two equal": ([4, 4], {}),
    "two unequal": ([7, 2], {}),
    "two with quarantined rows": ([3, 5], {0: 0, 4: 0, 7: 0}),
    "two with one real row": ([2, 2], {0: 0, 1: 0, 3: 0}),
    "four equal": ([4, 4, 4, 4], {}),
    "four unequal": ([1, 6, 3, 2], {}),
    "four longer than a tile": ([600, 530, 3, 100], {}),
    "four, one quarantined": ([2, 3, 2, 1], {2: 0, 3: 0, 4: 0}),
    "four without a real row": ([1, 1, 1, 1], {0: 0, 1: 0, 2: 0, 3: 0}),
}
TOO_FEW = ("two with one real row", "four without a real row")  # rows that count


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


def is_plain(split: str) -> bool:
    """Whether all rows count, and every rank has as many."""
    rows, weights = SPLITS[split]
    return len(set(rows)) == 1 and not weights


def rank_main(rank: int, folder: Path) -> None:
    """What each rank runs: every case, its results written to a file."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=90),
    )
    groups = {size: dist.new_group(list(range(size))) for size in (1, 2)}
    results = {}
    for split, (rows, _) in SPLITS.items():
        world = len(rows)
        if rank >= world:
            continue
        group = groups.get(world)
        x, weights, encoder = whole_batch(split)
        x_b, weights_b = x.split(rows)[rank], weights.split(rows)[rank]
        with CommDebugMode() as forward:
            losses = []
            for case, options in enumerate(OPTIONS):
                z_BD = x_b @ encoder.T
                if case % 2:  # the two forms of one thing
                    known = is_plain(split)
                    counting_WB = None if known else rows_that_count(z_BD, weights_b, group)
                    pending = start_gather(z_BD, counting_WB=counting_WB, group=group)
                    losses.append(mmd_of(pending, **options))
                else:
                    losses.append(mmd(z_BD, weights_B=weights_b, group=group, **options))
        with CommDebugMode() as backward:
            gradients = [torch.autograd.grad(loss, encoder)[0] for loss in losses]
        for gradient in gradients:
            dist.all_reduce(gradient, group=group)
            gradient /= world  # the engine's mean reduction
        results[split] = {
            "values": [loss.item() for loss in losses],
            "gradients": [gradient.tolist() for gradient in gradients],
            "collectives": [forward.get_total_counts(), backward.get_total_counts()],
        }
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(run_ranks, tmp_path_factory):
    """By split, what each of its ranks computed; one launch for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(__file__, WORLD, folder)
    found = {split: [] for split in SPLITS}
    for rank in range(WORLD):
        for split, result in json.loads((folder / f"{rank}.json").read_text()).items():
            found[split].append(result)
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_ranks_give_the_value_and_gradient_of_one_process_on_the_whole_batch(results, split):
    ranks = results[split]
    assert len(ranks) == len(SPLITS[split][0])
    for case, options in enumerate(OPTIONS):
        x, weights, encoder = whole_batch(split)
        expected = mmd(x @ encoder.T, weights_B=weights, **options)
        (expected_gradient,) = torch.autograd.grad(expected, encoder)
        for result in ranks:
            value = result["values"][case]
            assert value == ranks[0]["values"][case]
            assert value == pytest.approx(expected.item(), rel=1e-5, abs=5e-7), options
            gradient = torch.tensor(result["gradients"][case], dtype=torch.float64)
            error = (gradient - expected_gradient).norm()
            assert error <= 1e-5 * expected_gradient.norm(), (options, error)


def test_fewer_than_two_real_rows_over_all_ranks_give_0_with_zero_gradient(results):
    for split in TOO_FEW:
        for result in results[split]:
            assert not any(result["values"])
            assert not torch.tensor(result["gradients"]).any()


def test_forward_calls_few_collectives_and_backward_none(results):
    cases = len(OPTIONS)
    for split, (rows, _) in SPLITS.items():
        # The codes and the value; and which rows count, where that is not known.
        forward = 3 * cases if is_plain(split) else 4 * cases
        if len(rows) == 1:
            forward = 0
        elif split in TOO_FEW:
            forward -= cases  # there is no value to sum
        for result in results[split]:
            assert result["collectives"] == [forward, 0], split


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
