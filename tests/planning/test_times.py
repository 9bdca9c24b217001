"""Seconds, hours and dollars of a plan, by numbers that were computed by hand."""

from itertools import pairwise

import pytest
import torch

from t5vae.common.errors import UserError
from t5vae.config import BatchSplit
from t5vae.model import T5VAE, training_flops
from t5vae.planning.machine import DEVICES, LINKS, Machine
from t5vae.planning.memory import regime_of
from t5vae.planning.plan import plan
from t5vae.planning.times import (
    StepTime,
    checkpoint_time,
    course,
    operations,
    step_time,
    tokens_of,
)
from t5vae.training.build import model_config
from t5vae.training.meter import PEAKS
from t5vae.training.optimisers.muon import Muon

RANKS = (1, 8, 512, 1024)
COUNTS = {"model": 3 * 10**12, "recomputed": 10**12, "muon": 10**12}
SENT = {"gradients": 10**10, "weights": 5 * 10**9, "latents": 0}
FAST = Machine("h100", tflops=10, utilisation=0.5, network=400, store=2, disk=4)


@pytest.fixture
def regime(make_config):
    def make(stage=1, ranks=16, accumulation=1, **sections):
        config = make_config(deepspeed={"zero_stage": stage}, **sections)
        return regime_of(config, BatchSplit(4 * ranks * accumulation, ranks, 4, accumulation))

    return make


def seconds(regime, *, nodes=2, read=0.0, accelerated=True, sent=SENT, machine=FAST):
    rates = machine.rates(accelerated=accelerated, half=True)
    return step_time(regime, COUNTS, sent, read, rates, nodes=nodes, accelerated=accelerated)


def test_every_device_whose_peak_is_known_has_a_link():
    assert LINKS.keys() == PEAKS.keys()
    assert {"h100", "h100-pcie", "mi300x"} < DEVICES.keys()


def test_rates_are_bytes_and_operations_a_second():
    rates = Machine("A100", network=100, store=3, disk=0.5).rates(accelerated=True, half=True)
    assert (rates.peak, rates.utilisation, rates.link) == (312e12, 0.4, 300e9)
    assert (rates.network, rates.store, rates.disk) == (12.5e9, 3e9, 0.5e9)
    assert Machine("a100").rates(accelerated=True, half=False).peak == 156e12
    assert Machine("a100").rates(accelerated=False, half=True).peak is None
    assert Machine(tflops=2).rates(accelerated=False, half=False).peak == 2e12


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"device": "h1000"}, "--device h1000 is not known: choose b200"),
        ({"tflops": 0}, "--tflops is 0"),
        ({"utilisation": -1}, "--utilisation is -1"),
        ({"network": float("nan")}, "--network is nan"),
        ({"disk": float("inf")}, "--disk is inf"),
        ({"price": 0}, "--price is 0"),
    ],
)
def test_rates_that_are_none_are_one_line(given, says):
    with pytest.raises(UserError, match=says) as caught:
        Machine(**given).rates(accelerated=True, half=True)
    assert "\n" not in str(caught.value)


# At 5e12 operations and 50e9 bytes a second: 0.6 s of the model, 0.2 of it again, 0.2 of Muon;
# 0.2 s of gradients, 0.1 of weights. The backward pass is 0.4 + 0.2 s of the model's.
@pytest.mark.parametrize(
    ("stage", "accumulation", "at_best"),
    [
        (0, 1, 1.3),
        (1, 1, 1.3 - 0.2),
        (1, 4, 1.3 - 0.6 / 4),
        (2, 4, 1.3 - 0.2),
        (3, 1, 1.3 - 0.3),
    ],
)
def test_what_overlaps_follows_from_the_stage(regime, stage, accumulation, at_best):
    found = seconds(regime(stage, accumulation=accumulation))
    assert found.compute == pytest.approx({"model": 0.6, "recomputed": 0.2, "muon": 0.2})
    assert found.sent == pytest.approx({"gradients": 0.2, "weights": 0.1})
    assert found.at_best == pytest.approx(at_best)
    assert found.at_most == pytest.approx(1.3)


def test_nothing_overlaps_on_cpus_or_where_deepspeed_is_told_so(regime, make_config):
    alone = make_config().deepspeed.model_copy(
        update={"config": {"zero_optimization": {"overlap_comm": False}}}
    )
    config = make_config(deepspeed=alone.model_dump())
    told = regime_of(config, BatchSplit(64, 16, 4, 1))
    assert seconds(told).at_best == pytest.approx(1.3)
    assert seconds(regime(), nodes=16, accelerated=False).at_best == pytest.approx(1.3)


def test_sending_takes_as_long_as_the_slowest_way_of_the_ring(regime):
    assert seconds(regime(0), nodes=1).sent["gradients"] == pytest.approx(10**10 / 450e9)
    assert seconds(regime(0), nodes=2).sent["gradients"] == pytest.approx(10**10 / 50e9)
    wide = Machine("l4", tflops=10, network=3200)
    assert seconds(regime(0), nodes=2, machine=wide).sent["gradients"] == pytest.approx(10 / 32)
    one_a_node = seconds(regime(0), nodes=16, machine=wide)
    assert one_a_node.sent["gradients"] == pytest.approx(10**10 / 400e9)


def test_reading_hides_behind_a_step_until_it_is_longer(regime):
    few = seconds(regime(0), read=10**6)
    assert few.reading == pytest.approx(16 * 10**6 / 2e9)  # the store's; the network has 50e9
    assert (few.at_best, few.at_most) == pytest.approx((1.3, 1.3 + few.reading))
    many = seconds(regime(0), read=10**9)
    assert many.at_best == pytest.approx(8)
    quick = Machine("h100", tflops=10, utilisation=0.5, network=8, store=1000)
    assert seconds(regime(0), read=10**9, machine=quick).reading == pytest.approx(8)


def test_a_step_of_a_cpu_has_no_time_without_its_peak(regime):
    assert seconds(regime(), nodes=16, accelerated=False, machine=Machine()) is None


@pytest.mark.parametrize(
    ("ranks", "nodes", "expected"),
    [
        (1, 1, 12 / 1.5 + 12 / 4),
        (8, 1, 12 / 1.5 + 96 / 4),
        (512, 64, 12 / 1.5 + 512 * 12 / 4),
        (1024, 128, 12 / 1.5 + 1024 * 12 / 4),
    ],
)
def test_a_checkpoint_is_hashed_by_each_rank_and_shares_the_disk(ranks, nodes, expected):
    rates = FAST.rates(accelerated=True, half=True)
    found = checkpoint_time(12 * 10**9, rates, ranks=ranks, nodes=nodes)
    assert (found.of_rank, found.in_all) == (12 * 10**9, ranks * 12 * 10**9)
    assert found.seconds == pytest.approx(expected)


def test_a_wide_disk_is_reached_through_each_nodes_network():
    rates = Machine(network=8, disk=10**6).rates(accelerated=True, half=True)
    found = checkpoint_time(3 * 10**9, rates, ranks=512, nodes=64)
    assert found.seconds == pytest.approx(2 + 8 * 3)


@pytest.mark.parametrize("ranks", RANKS)
def test_hours_and_dollars_are_those_of_all_devices(ranks):
    found = course(7200, StepTime({}, {}, 0, at_best=0.5, at_most=2), ranks, 2.5)
    assert found.hours == (1, 4)
    assert found.device_hours == (ranks, 4 * ranks)
    assert found.dollars == (2.5 * ranks, 10 * ranks)
    assert course(1, StepTime({}, {}, 0, 1, 1), ranks, None).dollars is None


def test_muon_iterates_on_a_matrix_or_its_gram_matrix():
    assert Muon.operations(4, 4) == 5 * (2 * 64 + 2 * 64 + 2 * 64)
    assert Muon.operations(2, 100) == Muon.operations(100, 2) == 2 * 2 * 4 * 100 + 17 * 16


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_operations_of_a_rank_are_of_its_share(make_config, stage):
    config = make_config(deepspeed={"zero_stage": stage})
    settings = model_config(config.model, config.objective, config.data.open())
    with torch.device("meta"):
        model = T5VAE(settings)

    def counted(ranks, **options):
        regime = regime_of(config, BatchSplit(6 * ranks, ranks, 3, 2))
        options = {"checkpointing": False, "accelerated": True} | options
        return operations(settings, regime, model, (24, 10.5), **options)

    few, many = counted(1), counted(1024)
    assert few["model"] == many["model"] == training_flops(settings, 6, 24, 24, 63)
    layers = training_flops(settings, 6, 24, 24, 0) // 3
    assert counted(8, checkpointing=True)["recomputed"] == layers
    assert "recomputed" not in few
    assert many["objective"] > few["objective"]  # of the codes of all ranks
    matrices = [
        Muon.operations(*weight.shape)
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and "shared" not in name and "relative" not in name
    ]
    assert few["muon"] == sum(matrices)
    assert many["muon"] == (max(matrices) if stage else sum(matrices))
    assert counted(2)["muon"] == (sum(matrices) // 2 if stage else sum(matrices))


def test_accelerators_compute_pads_and_cpus_do_not(make_config):
    dataset = make_config().data.open()
    split = dataset.indexes[0].split("train")
    mean = split.tokens / split.sequences
    assert mean < 24
    assert tokens_of(dataset, 24, accelerated=True) == (24, pytest.approx(mean))
    assert tokens_of(dataset, 24, accelerated=False) == pytest.approx((mean, mean))
    assert tokens_of(None, 24, accelerated=False) == (24, 24)


@pytest.mark.parametrize("stage", [1, 3])
def test_more_ranks_do_less_each_and_the_same_together(make_config, stage):
    config = make_config(
        data={**make_config().data.model_dump(), "global_batch_size": 2048},
        optim={"name": "adamw"},
        deepspeed={"zero_stage": stage},
        train={"steps": 3600},
    )
    machine = Machine("h100", price=2)
    plans = {
        ranks: plan(config, nodes=-(-ranks // 8), gpus_per_node=min(8, ranks), machine=machine)
        for ranks in RANKS
    }
    for ranks, found in plans.items():
        assert found.world_size == ranks
        in_all = found.operations["model"] * ranks
        assert in_all == pytest.approx(plans[1].operations["model"], rel=1e-3)
        assert found.checkpoint.in_all == pytest.approx(plans[1].checkpoint.of_rank, rel=0.1)
        assert found.step.at_best <= found.step.at_most
        assert found.run.hours == pytest.approx((found.step.at_best, found.step.at_most))
        assert found.run.dollars[1] == pytest.approx(2 * ranks * found.step.at_most)
        assert found.epoch.steps == pytest.approx(found.reads and 360 / 2048, rel=0.05)
        assert found.store_per_epoch["all"] == pytest.approx(
            found.store_per_epoch["node"] * max(1, ranks // 8)
        )
    for fewer, more in pairwise(plans.values()):
        assert more.checkpoint.of_rank < fewer.checkpoint.of_rank
        assert more.step.compute["model"] < fewer.step.compute["model"]
        assert sum(more.sent.values()) > sum(fewer.sent.values())
    assert plans[1].step.sent == {}
