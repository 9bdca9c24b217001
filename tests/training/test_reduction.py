"""How gradients are summed, over micro steps and ranks: settings of DeepSpeed, under the user's."""

from typing import Any

import pytest
import torch

from t5vae.config import BatchSplit, DeepSpeed, Optim
from t5vae.training.deepspeed_settings import deepspeed_config
from t5vae.training.engine import _reduction
from t5vae.training.optimisers import Place
from tests import refused

RANKS, STEPS = "communication_data_type", "data_types"
FP32 = {RANKS: "fp32", STEPS: {"grad_accum_dtype": "fp32"}}


def made(
    ranks: int, steps: int, stage: int = 1, precision: str = "bf16", user: Any = None
) -> dict[str, Any]:
    """DeepSpeed's configuration for so many ranks and micro steps."""
    split = BatchSplit(ranks * steps, ranks, 1, steps)
    settings = deepspeed_config(DeepSpeed(zero_stage=stage, config=user), Optim(), precision, split)
    return {name: settings[name] for name in FP32 if name in settings}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_more_than_two_gradients_in_bf16_are_summed_in_fp32(stage):
    both = FP32 if stage else {RANKS: "fp32"}  # without ZeRO, DeepSpeed sums micro steps in bf16
    assert made(3, 1, stage) == {RANKS: "fp32"}
    assert made(2, 2, stage) == both
    assert made(1, 3, stage) == both


@pytest.mark.parametrize(("ranks", "steps"), [(1, 1), (2, 1), (1, 2)])
def test_a_sum_of_two_gradients_is_left_in_bf16_which_it_is_rounded_to_anyway(ranks, steps):
    assert made(ranks, steps) == {}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_in_other_precisions_are_summed_as_deepspeed_does(precision):
    assert made(4, 4, precision=precision) == {}


@pytest.mark.parametrize(("given", "summed"), [("bf16", "bf16"), ("auto", "fp32")])
def test_a_user_may_have_gradients_summed_in_bf16(given, summed):
    user = {RANKS: given, STEPS: {"grad_accum_dtype": given, "buffer_dtype": "fp32"}}
    types = {"grad_accum_dtype": summed, "buffer_dtype": "fp32"}
    assert made(4, 4, user=user) == {RANKS: summed, STEPS: types}


def test_a_users_sum_over_micro_steps_in_fp32_is_refused_without_zero_alone():
    user = {STEPS: {"grad_accum_dtype": "fp32"}}
    assert "zero_stage to 1" in refused.refusal(made, 1, 1, 0, user=user)
    assert made(1, 1, user=user) == user


@pytest.mark.parametrize(
    ("stage", "place", "overlaps"),
    [
        (1, Place(ranks=2, on_cpu=False, offloaded=False), True),
        (2, Place(ranks=2, on_cpu=False, offloaded=False), True),
        (1, Place(ranks=1, on_cpu=False, offloaded=False), False),
        (2, Place(ranks=2, on_cpu=True, offloaded=False), False),
        (2, Place(ranks=2, on_cpu=False, offloaded=True), False),
        (3, Place(ranks=2, on_cpu=False, offloaded=False), False),  # left to DeepSpeed, which does
    ],
)
def test_at_stages_1_and_2_accelerators_reduce_while_the_backward_pass_goes_on(
    stage, place, overlaps
):
    assert _reduction(torch.nn.Linear(3, 2), stage, place).get("overlap_comm", False) == overlaps


@pytest.mark.parametrize(("stage", "most"), [(1, 50_000_000), (2, 50_000_000), (3, 250_000_000)])
def test_a_bucket_holds_the_model_or_what_is_reduced_at_once(stage, most):
    place = Place(ranks=2, on_cpu=False, offloaded=False)
    with torch.device("meta"):
        models = [torch.nn.Linear(3, 2), torch.nn.Linear(300_000, 1_000)]
    sizes = [_reduction(model, stage, place)["reduce_bucket_size"] for model in models]
    assert sizes == [8, most]
