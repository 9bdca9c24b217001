"""The precision of a run whose configuration leaves it open."""

import pytest
import torch

from t5vae.config import Config
from t5vae.training.precision import multiplies_bf16, native_precision, settled

CPU = torch.device("cpu")


def config(**train: object) -> Config:
    return Config(data={"shards": "x"}, train=train)


def test_no_precision_is_the_default_and_is_settled_by_the_device():
    assert config().train.precision is None
    assert settled(config(), "bf16").train.precision == "bf16"
    assert settled(config(), "fp32").train.precision == "fp32"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_precision_that_is_set_stays(precision):
    assert settled(config(precision=precision), "bf16").train.precision == precision


def test_settling_changes_nothing_else():
    before, after = config(steps=7), settled(config(steps=7), "fp32")
    assert after.model_copy(update={"train": before.train}) == before
    assert after.train.steps == 7


@pytest.mark.parametrize(("able", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_cpu_computes_in_bf16_only_where_it_multiplies_in_it(monkeypatch, able, precision):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: able)
    assert multiplies_bf16(CPU) is able
    assert native_precision(CPU) == precision


@pytest.mark.parametrize("able", [True, False])
def test_emulated_bf16_of_a_cuda_device_does_not_count(monkeypatch, able):
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or able,
    )
    assert multiplies_bf16(torch.device("cuda")) is able
