import time

import psutil
import pytest
import torch

from t5vae.config import BatchSplit
from t5vae.model import T5VAE, training_flops
from t5vae.training import meter
from t5vae.training.build import model_config
from t5vae.training.meter import Meter, peak_flops, peak_memory, work_of

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when it is told to, in seconds."""

    class Clock:
        now = 100.0

        def passes(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def test_speeds_are_of_all_ranks_and_begin_anew_at_each_reading(clock):
    found = Meter(CPU, BatchSplit(16, 2, 8, 1), peak=None)
    for _ in range(4):
        clock.passes(0.5)
        found.count(tokens=100, flops=1e9, waited=0)
    figures = found.read()
    assert figures["tokens_per_second"] == 200
    assert figures["sequences_per_second"] == 32
    assert figures["step_seconds"] == 0.5
    assert "mfu" not in figures
    clock.passes(1.0)
    found.count(tokens=50, flops=1e9, waited=0)
    assert found.read()["tokens_per_second"] == 50


def test_mfu_is_the_operations_done_over_those_that_all_devices_could_do(clock):
    found = Meter(CPU, BatchSplit(4, 4, 1, 1), peak=1e12)
    clock.passes(2.0)
    found.count(tokens=1, flops=2e12, waited=0)
    assert found.read()["mfu"] == pytest.approx(2e12 / (2.0 * 4 * 1e12))


def test_waiting_is_part_of_the_time_and_what_is_apart_is_not(clock):
    found = Meter(CPU, BatchSplit(8, 1, 8, 1), peak=None)
    clock.passes(4.0)
    assert found.apart(lambda seconds: clock.passes(seconds) or "done")(50.0) == "done"
    found.count(tokens=80, flops=0, waited=1.0)
    figures = found.read()
    assert figures["data_wait"] == 0.25
    assert figures["tokens_per_second"] == 20
    assert figures["step_seconds"] == 4.0


def test_what_is_apart_is_so_though_it_fails(clock):
    def fail():
        clock.passes(50.0)
        raise OSError("full")

    found = Meter(CPU, BatchSplit(8, 1, 8, 1), peak=None)
    with pytest.raises(OSError, match="full"):
        found.apart(fail)()
    clock.passes(2.0)
    found.count(tokens=80, flops=0, waited=0)
    assert found.read()["step_seconds"] == 2.0


def test_memory_is_the_most_that_the_process_held():
    before = peak_memory(CPU)
    held = torch.ones(2**25)
    now = psutil.Process().memory_info().rss
    assert now > held.nbytes
    assert peak_memory(CPU) >= max(before, 0.99 * now)


def test_the_operations_of_a_batch_are_those_of_the_model(make_config):
    from shards import ShardStream

    config = make_config()
    dataset = config.data.open()
    model = model_config(config.model, config.objective, dataset)
    assert isinstance(T5VAE(model), T5VAE)
    with ShardStream(dataset, seed=0, global_batch_size=16) as stream:
        for _, batch in zip(range(4), stream, strict=False):
            rows, width = batch.ids.shape
            tokens = int(batch.lengths.sum())
            assert work_of(model)(batch) == training_flops(model, rows, width, width, tokens)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A40", 150e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA GeForce 256", None),
    ],
)
def test_the_peak_is_known_by_the_devices_name(monkeypatch, name, peak):
    monkeypatch.setattr(meter.torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), half=True) == peak
    assert peak_flops(torch.device("cuda", 0), half=False) is None


def test_a_cpu_has_no_peak_to_compare_with():
    assert peak_flops(CPU, half=True) is None
