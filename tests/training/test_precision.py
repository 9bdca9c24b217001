"""The precision of a run whose configuration leaves it open.

The last test starts this file itself, once for each of two ranks.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from t5vae.cluster.agreement import from_first
from t5vae.config import Config
from t5vae.training import precision
from t5vae.training.build import model_config
from t5vae.training.precision import model_products, product_seconds, settled

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 48, "num_layers": 1, "num_heads": 2}
SIZES = {"t5": T5, "vocab_size": 100, "sequence_length": 8}


def config(optimizer: str = "adamw", muon_precision: str | None = None, **train: object) -> Config:
    return Config(
        data={"shards": "x", "global_batch_size": 32},
        model=SIZES,
        optim={"name": optimizer, "muon_precision": muon_precision},
        train=train,
    )


def settle(given: Config, before: object) -> tuple[Config, list[str]]:
    """`precision.settle` of a run of two ranks."""
    settings = model_config(given.model, given.objective, None)
    return precision.settle(given, settings, given.data.split(2), CPU, before)


@pytest.fixture
def clock(monkeypatch):
    """Sets what products take in fp32 and bf16, in seconds; gives the products that were timed."""

    def set_times(fp32: float, bf16: float) -> list:
        timed = []

        def seconds(products, dtype, device):
            timed.append(products)
            return fp32 if dtype == FP32 else bf16

        monkeypatch.setattr(precision, "product_seconds", seconds)
        return timed

    return set_times


@pytest.mark.parametrize(
    ("fp32", "bf16", "chosen"),
    [(1.2, 1.0, "bf16"), (1.19, 1.0, "fp32"), (3.0, 1.0, "bf16"), (1.0, 60.0, "fp32")],
)
def test_bf16_is_taken_where_the_clock_says_that_it_is_1_2_times_as_fast(clock, fp32, bf16, chosen):
    clock(fp32 / 1e3, bf16 / 1e3)
    settled, (reason,) = settle(config(), {})
    assert settled.train.precision == chosen
    times = {"fp32": f"{fp32:g} ms", "bf16": f"{bf16:g} ms"}
    other = "fp32" if chosen == "bf16" else "bf16"
    assert reason == (
        f"{chosen}: its products take {times[chosen]}, those of {other} {times[other]}, "
        "on the slowest rank"
    )


@pytest.fixture
def matmul():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


@pytest.mark.parametrize("before", ["tf32", "ieee"])
def test_products_in_fp32_are_timed_as_a_model_multiplies_on_cuda(monkeypatch, matmul, before):
    during = []

    def seconds(*_):
        during.append(matmul.fp32_precision)
        return 0.0

    matmul.fp32_precision = before
    monkeypatch.setattr(precision, "_seconds", seconds)
    product_seconds([(8, 8, 8)], FP32, CPU)
    assert set(during) == {"tf32"}
    assert matmul.fp32_precision == before


def test_muons_iteration_is_chosen_by_square_products_of_its_own(clock):
    timed = clock(1.0, 2.0)
    settled, reasons = settle(config("muon"), {})
    assert (settled.train.precision, settled.optim.muon_precision) == ("fp32", "fp32")
    assert [reason.startswith("muon in fp32: ") for reason in reasons] == [False, True]
    assert timed[-1] == [(16, 16, 16)]
    assert settle(config(), {})[0].optim.muon_precision is None


def test_the_products_are_the_models_own():
    given = config()
    settings = model_config(given.model, given.objective, None)
    assert model_products(settings, 7) == [(7, 8, 16), (7, 48, 16), (7, 16, 48), (7, 100, 16)]


@pytest.mark.parametrize("set_", ["fp32", "bf16", "fp16"])
def test_a_precision_that_is_set_stays_and_nothing_is_timed(clock, set_):
    timed = clock(1.0, 2.0)
    given = config("muon", "bf16", precision=set_)
    assert settle(given, {"precision": "fp32"}) == (given, [])
    assert settled(given, "bf16") == given
    assert timed == []


def test_a_run_that_goes_on_keeps_its_precisions_and_nothing_is_timed(clock):
    timed = clock(1.0, 2.0)
    before = {"precision": "fp16", "muon_precision": "bf16"}
    kept, reasons = settle(config("muon"), before)
    assert (kept.train.precision, kept.optim.muon_precision) == ("fp16", "bf16")
    assert timed == reasons == []


def test_settling_changes_nothing_else():
    before, after = config(steps=7), settled(config(steps=7), "fp32")
    assert after.train.precision == "fp32"
    assert after.model_copy(update={"train": before.train}) == before
    assert after.train.steps == 7


def test_products_that_take_too_long_are_known_by_a_few_of_their_rows(monkeypatch):
    tried = []

    def seconds(sizes, rows, dtype, device, budget):
        tried.append(rows)
        return rows * 0.01

    monkeypatch.setattr(precision, "_seconds", seconds)
    assert product_seconds([(64, 8, 8)], BF16, CPU) == pytest.approx(0.64)
    assert max(tried) == precision.FEW


def test_large_models_are_timed_by_a_part_of_them(monkeypatch):
    tried = []

    def seconds(sizes, rows, dtype, device, budget):
        tried.append((rows, sizes))
        return 0.0

    monkeypatch.setattr(precision, "_seconds", seconds)
    product_seconds([(10**6, 256_000, 8192), (10**6, 8192, 8192)], FP32, CPU)
    (rows, sizes) = tried[-1]
    widest, operations = precision.LIMITS["cpu"]
    assert sum(6 * rows * n * k for n, k in sizes) <= operations
    assert rows > precision.FEW
    assert max(max(size) for size in sizes) == widest


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_real_products_take_some_time_and_draw_no_numbers(dtype):
    state = torch.get_rng_state()
    assert product_seconds([(64, 8, 16), (64, 16, 8)], dtype, CPU) > 0
    assert torch.equal(torch.get_rng_state(), state)


def rank_main(rank: int, folder: Path) -> None:
    """Rank 0 multiplies faster in bf16, rank 1 emulates it: each alone would choose otherwise."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    times = {0: {FP32: 3e-3, BF16: 1e-3}, 1: {FP32: 2e-3, BF16: 5e-3}}
    precision.product_seconds = lambda products, dtype, device: times[rank][dtype]
    chosen, (reason,) = settle(config(), from_first(lambda: {}))
    found = {"precision": chosen.train.precision, "reason": reason}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.distributed
def test_all_ranks_choose_what_is_faster_for_the_slowest(run_ranks, tmp_path):
    run_ranks(__file__, 2, tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0]["precision"] == "fp32"
    assert "take 3 ms, those of bf16 5 ms, on the slowest rank" in found[0]["reason"]


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
