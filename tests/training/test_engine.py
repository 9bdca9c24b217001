import copy
import itertools
import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from t5vae.common.errors import UserError
from t5vae.config import Config, Optim
from t5vae.training.deepspeed_settings import check_settings, deepspeed_config
from t5vae.training.engine import (
    _skip_nonfinite,
    _undo_first_step,
    build_engine,
    gradient_norm,
    schedule,
)
from tests import refused


def made(world_size: int = 1, user: object = None, **sections: dict) -> dict:
    """DeepSpeed's configuration of a run with a batch of 64."""
    data = {"shards": "x", "global_batch_size": 64, **sections.pop("data", {})}
    zero = {"config": user, **sections.pop("zero", {})}
    train = {"precision": "bf16", **sections.pop("train", {})}
    config = Config(data=data, deepspeed=zero, train=train, **sections)
    split = config.data.split(world_size)
    return deepspeed_config(config.deepspeed, config.optim, config.train.precision, split)


refusal = partial(refused.refusal, made)


def test_the_accumulation_follows_from_batch_micro_batch_and_ranks():
    ours = made(4, data={"micro_batch_size": 8})
    assert ours["train_batch_size"] == 64
    assert ours["train_micro_batch_size_per_gpu"] == 8
    assert ours["gradient_accumulation_steps"] == 2
    assert made(4)["train_micro_batch_size_per_gpu"] == 16


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_zero_stage_is_passed_on(stage):
    assert made(zero={"zero_stage": stage})["zero_optimization"]["stage"] == stage


def test_one_precision_is_switched_on_at_most():
    def enabled(precision: str) -> set[str]:
        ours = made(train={"precision": precision})
        return {kind for kind in ("bf16", "fp16") if ours.get(kind, {}).get("enabled")}

    assert enabled("fp32") == set()
    assert enabled("bf16") == {"bf16"}
    assert enabled("fp16") == {"fp16"}


@pytest.mark.parametrize(
    ("zero", "devices"),
    [
        ({"zero_stage": 3}, {}),
        ({"zero_stage": 2, "offload_optimizer": True}, {"offload_optimizer": "cpu"}),
        ({"zero_stage": 3, "offload_parameters": True}, {"offload_param": "cpu"}),
        (
            {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
            {"offload_optimizer": "cpu", "offload_param": "cpu"},
        ),
    ],
)
def test_what_is_to_be_in_host_memory_is_offloaded(zero, devices):
    ours = made(zero=zero)["zero_optimization"]
    offloaded = {name: of["device"] for name, of in ours.items() if name.startswith("offload")}
    assert offloaded == devices


def test_a_users_own_settings_of_offloading_are_kept_beside_ours():
    user = {"zero_optimization": {"offload_optimizer": {"pin_memory": True}}}
    ours = made(1, user, zero={"offload_optimizer": True})
    assert ours["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
def test_offloading_to_where_no_checkpoint_looks_is_refused(name):
    user = {"zero_optimization": {name: {"device": "nvme", "nvme_path": "/local"}}}
    message = refusal(1, user, zero={"zero_stage": 3})
    assert f"zero_optimization.{name}.device" in message
    assert "nvme" in message


def test_muon_is_given_whole_gradients_at_stage_3():
    for stage, name in itertools.product((1, 2, 3), ("adamw", "muon")):
        ours = made(optim={"name": name}, zero={"zero_stage": stage})["zero_optimization"]
        assert ours.get("reduce_scatter", True) is not (stage == 3 and name == "muon")


@pytest.mark.parametrize(
    ("optim", "norm"),
    [
        ({"name": "adamw"}, 1.0),
        ({"name": "adamw", "gradient_clipping": 0.3}, 0.3),
        ({"name": "adamw", "gradient_clipping": 0}, 0.0),
        ({"name": "muon"}, 0.0),
        ({"name": "muon", "gradient_clipping": 0}, 0.0),
    ],
)
def test_clipping_is_always_explicit_and_off_under_muon(optim, norm):
    assert made(optim=optim)["gradient_clipping"] == norm


def test_a_users_own_settings_are_kept_beside_ours():
    user = {
        "zero_optimization": {"stage": 1, "overlap_comm": False},
        "wall_clock_breakdown": True,
        "train_batch_size": "auto",
    }
    merged = made(2, user)
    assert merged["zero_optimization"] == {"stage": 1, "overlap_comm": False}
    assert merged["wall_clock_breakdown"] is True
    assert merged["train_batch_size"] == 64
    assert user["train_batch_size"] == "auto"


def test_a_users_file_is_read(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"overlap_comm": True}}))
    assert made(1, str(path))["zero_optimization"] == {"stage": 1, "overlap_comm": True}


@pytest.mark.parametrize(
    ("user", "key", "theirs", "ours"),
    [
        ({"train_batch_size": 32}, "train_batch_size", "32", "64"),
        ({"gradient_accumulation_steps": 7}, "gradient_accumulation_steps", "7", "1"),
        ({"gradient_clipping": 0.7}, "gradient_clipping", "0.7", "0.0"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage", "3", "1"),
        ({"zero_optimization": 3}, "zero_optimization", "3", "1"),
        ({"bf16": {"enabled": False}}, "bf16.enabled", "False", "True"),
        ({"fp16": {"enabled": True}}, "fp16.enabled", "True", "False"),
    ],
)
def test_a_contradiction_is_refused_with_the_key_and_both_values(user, key, theirs, ours):
    message = refusal(1, user)
    assert key in message
    assert theirs in message
    assert ours in message


def test_half_precision_of_a_users_own_is_refused_in_an_fp32_run():
    message = refusal(1, {"bf16": {"enabled": True}}, train={"precision": "fp32"})
    assert "bf16.enabled" in message


HUGGING_FACE = {  # the ZeRO-3 file of transformers' documentation, its optimizer left out
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_file_of_hugging_faces_is_filled_in(tmp_path, precision):
    path = tmp_path / "ds_config_zero3.json"
    path.write_text(json.dumps(HUGGING_FACE))
    merged = made(
        *(2, str(path)),
        zero={"zero_stage": 3},
        train={"precision": precision},
        optim={"name": "adamw"},
        data={"micro_batch_size": 8},
    )
    assert "auto" not in json.dumps(merged)
    theirs = HUGGING_FACE["zero_optimization"] | HUGGING_FACE["fp16"]
    kept = {key: value for key, value in theirs.items() if value != "auto"}
    assert kept.items() <= {**merged["zero_optimization"], **merged["fp16"]}.items()
    assert merged["bf16"]["enabled"] is (precision == "bf16")
    assert merged["fp16"]["enabled"] is (precision == "fp16")
    assert merged["train_batch_size"] == 64
    assert merged["train_micro_batch_size_per_gpu"] == 8
    assert merged["gradient_accumulation_steps"] == 4
    assert merged["gradient_clipping"] == 1.0
    assert merged["steps_per_print"] == 2000
    assert {"reduce_bucket_size", "stage3_prefetch_bucket_size"}.isdisjoint(
        merged["zero_optimization"]
    )


@pytest.mark.parametrize(
    ("user", "left"),
    [
        ({"zero_optimization": "auto"}, {"stage": 1}),
        ({"zero_optimization": {"stage": "auto", "offload_optimizer": "auto"}}, {"stage": 1}),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "auto", "pin_memory": True}}},
            {"stage": 1, "offload_optimizer": {"pin_memory": True}},
        ),
        ({"fp16": "auto", "activation_checkpointing": {"profile": "auto"}}, {"stage": 1}),
    ],
)
def test_auto_at_any_depth_is_ours_or_left_to_deepspeed(user, left):
    merged = made(1, user)
    assert "auto" not in json.dumps(merged)
    assert merged["zero_optimization"] == left
    assert merged["bf16"] == {"enabled": True}


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_a_section_that_would_not_be_used_is_refused_though_it_is_auto(section):
    auto = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}
    assert section in refusal(1, HUGGING_FACE | {section: auto}, zero={"zero_stage": 3})


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_a_users_own_optimizer_or_scheduler_is_refused_rather_than_ignored(section):
    assert section in refusal(1, {section: {"type": "Adam", "params": {"lr": 1.0}}})


@pytest.mark.parametrize("content", ["{", "[1]", '"text"', ""])
def test_a_users_file_that_is_no_json_object_is_refused_by_name(tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(content)
    assert str(path) in refusal(1, str(path))


def test_a_users_missing_file_is_refused_by_name(tmp_path):
    assert "nowhere.json" in refusal(1, str(tmp_path / "nowhere.json"))


@given(
    steps=st.integers(1, 10**6),
    at=st.floats(0, 1, exclude_max=True),
    warmup=st.floats(0, 1),
    final=st.floats(0, 1),
    shape=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_the_learning_rate_is_positive_and_never_above_its_full_value(
    steps, at, warmup, final, shape
):
    optim = Optim(schedule=shape, warmup=warmup, final_lr=final)
    assert 0 < schedule(int(at * steps), steps, optim) <= 1


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_the_learning_rate_rises_evenly_over_the_warm_up(shape):
    optim = Optim(schedule=shape, warmup=0.04)
    assert [schedule(step, 100, optim) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_constant_rate_stays():
    optim = Optim(schedule="constant", warmup=0.1, final_lr=0.1)
    assert {schedule(step, 100, optim) for step in range(10, 100)} == {1.0}


def test_a_linear_rate_falls_in_equal_steps_towards_the_final_one():
    optim = Optim(schedule="linear", warmup=0.0, final_lr=0.2)
    shares = [schedule(step, 100, optim) for step in range(101)]
    assert shares[0] == 1.0
    assert shares[50] == pytest.approx(0.6)
    assert shares[100] == pytest.approx(0.2)
    falls = {round(a - b, 9) for a, b in itertools.pairwise(shares)}
    assert falls == {0.008}


def test_a_cosine_rate_falls_slowly_at_both_ends_towards_the_final_one():
    optim = Optim(schedule="cosine", warmup=0.0, final_lr=0.5)
    shares = [schedule(step, 100, optim) for step in range(101)]
    assert shares[0] == 1.0
    assert shares[50] == pytest.approx(0.75)
    assert shares[100] == pytest.approx(0.5)
    falls = [a - b for a, b in itertools.pairwise(shares)]
    assert all(fall > 0 for fall in falls)
    assert falls[0] < falls[50] > falls[99]


def test_the_schedule_takes_the_same_course_whatever_the_number_of_steps():
    for shape in ("cosine", "linear"):
        optim = Optim(schedule=shape, warmup=0.1, final_lr=0.1)
        short = [schedule(step, 100, optim) for step in range(10, 100)]
        long = [schedule(step, 1000, optim) for step in range(100, 1000, 10)]
        assert long == pytest.approx(short)


def test_a_device_without_fp16_is_refused_before_anything_is_built(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)
    settings = made(train={"precision": "fp16"})
    with pytest.raises(UserError, match=r"fp16: set train\.precision to bf16 or fp32"):
        build_engine(torch.nn.Linear(2, 2), settings, Optim())


@pytest.fixture
def stepping():
    """A model and its optimiser, after a step, which skips gradients that are not finite."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    _skip_nonfinite(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def snapshot(model, optimizer):
    return [
        tensor.clone()
        for parameter in model.parameters()
        for tensor in (parameter.detach(), *optimizer.state[parameter].values())
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_without_zero_a_gradient_that_is_not_finite_changes_neither_weights_nor_moments(
    stepping, value
):
    model, optimizer = stepping
    assert not optimizer.overflow
    before = snapshot(*stepping)
    model.bias.grad[1] = value
    optimizer.step()
    assert optimizer.overflow
    assert all(map(torch.equal, snapshot(*stepping), before))


def test_without_zero_the_step_after_one_that_was_skipped_is_that_of_adamw(stepping):
    model, optimizer = stepping
    plain = copy.deepcopy(model)
    reference = torch.optim.AdamW(plain.parameters())
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model.weight.grad[0, 0] = math.nan
    optimizer.step()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        one.grad = torch.full_like(one, 0.5)
        other.grad = one.grad.clone()
    optimizer.step()
    reference.step()
    assert not optimizer.overflow
    assert all(map(torch.equal, snapshot(*stepping), snapshot(plain, reference)))


def test_the_step_that_deepspeed_takes_without_gradients_is_forgotten():
    weight = torch.linspace(-1, 1, 6).bfloat16()
    master = torch.nn.Parameter(weight.float())
    base = torch.optim.AdamW([master], weight_decay=0.5)
    master.grad = torch.zeros_like(master)
    base.step()
    assert not master.equal(weight.float())
    wrapper = SimpleNamespace(optimizer=base, fp16_groups=[[weight]], fp32_groups=[[master]])
    _undo_first_step(wrapper)
    assert master.equal(weight.float())
    assert not base.state


@pytest.mark.parametrize(("name", "found"), [("adamw", 2.5), ("muon", None)])
def test_the_norm_of_the_gradient_is_told_where_deepspeed_knows_it(name, found):
    engine = SimpleNamespace(get_global_grad_norm=lambda: 2.5)
    assert gradient_norm(engine, Optim(name=name)) == found


@pytest.mark.parametrize("part", ["fp32", ["fp32"], 5])
@pytest.mark.parametrize("name", ["data_types", "zero_optimization.offload_optimizer"])
def test_a_part_of_the_users_own_that_is_no_object_is_refused(name, part):
    outer, _, inner = name.partition(".")
    told = refusal(user={outer: {inner: part} if inner else part})
    assert told == f"deepspeed.config sets {inner or outer} to {part!r}: give an object"


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ({"zero_optimization": {"no_such": 1}}, ["no_such", "not permitted"]),
        ({"zero_optimization": {"reduce_bucket_size": "many"}}, ["reduce_bucket_size", "integer"]),
        ({"communication_data_type": "fp7"}, ["communication_data_type", "fp7"]),
        ({"data_types": {"grad_accum_dtype": "fp7"}}, ["fp7"]),
        ({"activation_checkpointing": 5}, []),
    ],
)
def test_what_deepspeed_does_not_take_is_refused_in_a_line(user, words):
    told = refused.refusal(check_settings, made(user=user))
    assert told.startswith("DeepSpeed does not take deepspeed.config: ")
    for word in words:
        assert word in told


def test_what_deepspeed_takes_passes():
    check_settings(made(user={"data_types": {"grad_accum_dtype": "bf16"}}))
