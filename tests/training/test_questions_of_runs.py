"""What the steps of real runs ask of the device: ours one vector, DeepSpeed what it must.

The tests start this file itself, once for each rank.
"""

import json
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from t5vae.cluster.process_group import free_port
from t5vae.cluster.ranks import Ranks
from t5vae.cluster.stopping import StopRequest
from t5vae.cluster.together import Together
from t5vae.config import Config
from t5vae.training import loop, start
from tests.training.many_runs import BASE
from tests.training.questions import Questions

pytestmark = pytest.mark.distributed

WORLD, STEPS, ACCUMULATION = 2, 6, 2
RUNS = list(product((0, 1, 2, 3), ("fp32", "bf16"), ("adamw", "muon")))
OF_THE_HOST = (
    "shards/",  # what the loader reads
    "t5vae/training/feed.py",
    "t5vae/cluster/agreement.py",  # over gloo
    "t5vae/training/muon.py",  # a CPU's update
)
OF_DEEPSPEED = {
    0: {"has_overflow_serial", "has_overflow", "get_weight_norm"},
    1: {"has_overflow", "is_invalid_grad_norm"},
    2: {"has_overflow", "is_invalid_grad_norm"},
    3: {"is_invalid_grad_norm"},
}
"""Functions that read, by stage, as docs/training.md has them."""


def name_of(run: tuple[int, str, str]) -> str:
    return " ".join(map(str, run))


def asked_in_steps(config: Config, ranks: Ranks) -> list[list[tuple[str, str]]]:
    """What each step asks, from its data until the next one's."""
    steps: list[Questions] = []

    def begin(step: int) -> None:
        if steps:
            steps[-1].__exit__(None, None, None)
        steps.append(Questions().__enter__())

    with patch.object(loop, "begin_step", begin):
        loop.run(config, Together(ranks, config.run_dir, 60), StopRequest())
    steps[-1].__exit__(None, None, None)
    return [step.asked for step in steps]


def rank_main(rank: int, folder: Path) -> None:
    given = json.loads((folder / "base.json").read_text())
    ranks = Ranks(rank, WORLD, rank, WORLD, "127.0.0.1", given.pop("port"))
    start_process_group, device = start.start_process_group, []

    def start_once(*arguments: Any, **options: Any) -> torch.device:
        if not device:
            device.append(start_process_group(*arguments, **options))
        return device[0]

    found = {}
    with (
        patch.object(start, "start_process_group", start_once),
        patch.object(dist, "destroy_process_group", lambda: None),
    ):
        for run in RUNS:
            stage, precision, optimiser = run
            given |= {
                "run": {"name": "small", "output_dir": str(folder / name_of(run))},
                "deepspeed": {"zero_stage": stage},
                "train": {"steps": STEPS, "precision": precision},
                "optim": {"name": optimiser},
            }
            found[name_of(run)] = asked_in_steps(Config(**given), ranks)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def asked(run_ranks, short_dataset, tmp_path_factory) -> dict[str, list[list[Counter[Any]]]]:
    """By run and rank, of each step how often who asked what."""
    folder = tmp_path_factory.mktemp("ranks")
    data = {"shards": str(short_dataset), "global_batch_size": 72}
    data["micro_batch_size"] = 72 // WORLD // ACCUMULATION
    quiet = {"every": 0}
    base = {**BASE, "data": data, "log": {"every": STEPS}, "checkpoint": quiet, "eval": quiet}
    (folder / "base.json").write_text(json.dumps({**base, "port": free_port()}))
    environment = {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    run_ranks(__file__, WORLD, folder, **environment)
    said = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]
    return {
        name: [[Counter(map(tuple, step)) for step in of[name]] for of in said] for name in said[0]
    }


@pytest.mark.parametrize("run", RUNS, ids=name_of)
def test_a_step_of_ours_reads_one_vector_and_the_norm(asked, run):
    stage, precision, optimiser = run
    plain = stage == 0 and precision == "fp32"  # DeepSpeed has no norm, nor looks for overflows
    reads = 1 + (optimiser == "adamw" and not plain)
    expected = {("t5vae/training/outcome.py:read", "tolist"): reads}
    if plain:
        expected["t5vae/training/engine.py:step_if_finite", "_local_scalar_dense"] = 1
    for steps in asked[name_of(run)]:
        for step in steps[2:-1]:  # the first step's is read in the second; the last is logged
            ours = {
                each: times
                for each, times in step.items()
                if not each[0].startswith(("deepspeed/", *OF_THE_HOST))
            }
            assert ours == expected


@pytest.mark.parametrize("run", RUNS, ids=name_of)
def test_deepspeed_asks_what_the_documentation_says_once_a_step(asked, run):
    stage, *_ = run
    for steps in asked[name_of(run)]:
        for step in steps[2:-1]:
            reads = {
                who.rpartition(":")[2]: times
                for (who, what), times in step.items()
                if who.startswith("deepspeed/") and what == "_local_scalar_dense"
            }
            assert reads.keys() <= OF_DEEPSPEED[stage]
            if stage:  # and not for each weight
                assert sum(reads.values()) <= 4


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
