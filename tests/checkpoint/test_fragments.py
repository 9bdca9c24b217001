"""Fragments of engines at stage 0; those of other stages are in tests/training/test_elastic.py."""

import json
from types import SimpleNamespace

import pytest
import torch

from t5vae.checkpoint import fragments
from t5vae.checkpoint.rank_files import Fragments, write


def shares(engine, together, world):
    """What each rank would write."""
    return [
        share.result() for share in together(world).run(lambda rank: fragments.fragments(engine))
    ]


def reopened(folder, dealt):
    paths = [folder / f"rank-{rank}" for rank in range(len(dealt))]
    for path, tensors in zip(paths, dealt, strict=True):
        write(path, tensors, {})
    return Fragments(paths)


def state(engine):
    """Weights and the optimiser's state, by parameter."""
    return {
        name: {"weight": parameter.detach(), **engine.optimizer.state[parameter]}
        for name, parameter in engine.module.named_parameters()
    }


def is_equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_equal(one[key], other[key]) for key in one)
    return type(one) is type(other) and bool(
        one == other if isinstance(one, int) else one.equal(other)
    )


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_ranks_share_every_element_of_weights_and_moments_once(
    make_engine, together, optimizer, world
):
    engine = make_engine(optimizer)
    covered = {}
    for share in shares(engine, together, world):
        for key, tensor in share.items():
            kind, name, start = key.split("/")
            places = covered.setdefault((kind, name), [])
            places.extend(range(int(start), int(start) + tensor.numel()))
            whole = state(engine)[name][kind].flatten()
            assert tensor.equal(whole[int(start) : int(start) + tensor.numel()]), key
    wanted = {
        (kind, name): list(range(tensor.numel()))
        for name, kinds in state(engine).items()
        for kind, tensor in kinds.items()
        if kind != "step"
    }
    assert {key: sorted(places) for key, places in covered.items()} == wanted


@pytest.mark.parametrize("world", [2, 5])
def test_ranks_have_about_as_much_to_write(make_engine, together, world):
    engine = make_engine()
    sizes = [sum(map(torch.numel, share.values())) for share in shares(engine, together, world)]
    assert max(sizes) - min(sizes) <= 3 * len(list(engine.module.parameters()))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_moments_and_steps_come_back_exactly(
    tmp_path, make_engine, together, optimizer, world
):
    engine = make_engine(optimizer, steps=3)
    saved = reopened(tmp_path, shares(engine, together, world))
    shared = json.loads(json.dumps(fragments.scalars(engine)))
    assert shared["step"] == 3
    for other in (make_engine(optimizer, seed=1, steps=0), make_engine(optimizer, seed=1)):
        assert not is_equal(state(other), state(engine))
        fragments.load(other, saved, shared)
        assert is_equal(state(other), state(engine))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_next_step_is_that_of_the_run_that_went_on(tmp_path, make_engine, together, optimizer):
    engine, other = make_engine(optimizer, steps=2), make_engine(optimizer, seed=1, steps=0)
    saved = reopened(tmp_path, shares(engine, together, 2))
    fragments.load(other, saved, fragments.scalars(engine))
    with torch.compiler.set_stance("force_eager"):
        for going in (engine, other):
            for parameter in going.module.parameters():
                parameter.grad = torch.linspace(-3, 3, parameter.numel()).view_as(parameter)
            going.optimizer.step()
    assert is_equal(state(other), state(engine))


def test_an_optimizer_that_took_no_step_has_weights_alone(tmp_path, make_engine, together):
    engine, other = make_engine(steps=0), make_engine(seed=1, steps=0)
    dealt = shares(engine, together, 2)
    assert fragments.scalars(engine) == {"step": None, "loss_scale": {}}
    assert {key.split("/")[0] for share in dealt for key in share} == {"weight"}
    fragments.load(other, reopened(tmp_path, dealt), fragments.scalars(engine))
    assert is_equal(state(other), state(engine))
    assert not any(other.optimizer.state.values())


def test_weights_alone_are_loaded_where_that_is_asked_for(tmp_path, make_engine, together):
    engine, other = make_engine(), make_engine(seed=1)
    before = {name: dict(kinds) for name, kinds in state(other).items()}
    saved = reopened(tmp_path, shares(engine, together, 2))
    fragments.load_weights(other, saved)
    for name, kinds in state(other).items():
        assert kinds["weight"].equal(state(engine)[name]["weight"])
        assert all(kinds[kind] is before[name][kind] for kind in ("exp_avg", "exp_avg_sq", "step"))


def test_a_plain_model_is_filled(tmp_path, make_engine, together):
    engine, model = make_engine(), make_engine(seed=1).module
    fragments.fill_model(model, reopened(tmp_path, shares(engine, together, 3)))
    for wanted, found in zip(engine.module.parameters(), model.parameters(), strict=True):
        assert found.equal(wanted)


def test_a_rank_that_is_missing_is_a_gap(tmp_path, make_engine, together):
    engine = make_engine()
    saved = reopened(tmp_path, shares(engine, together, 3)[:2])
    with pytest.raises(ValueError, match="elements are saved"):
        fragments.load(make_engine(seed=1), saved, fragments.scalars(engine))


def half_precision(engine):
    """As DeepSpeed wraps it in half precision: fp32 weights beside the model's own."""
    base = engine.optimizer
    halves = [[p.detach().bfloat16() for p in group["params"]] for group in base.param_groups]
    names = [name for name, _ in engine.module.named_parameters()]
    model = SimpleNamespace(named_parameters=lambda: zip(names, *halves, strict=True))
    scale = SimpleNamespace(
        cur_scale=512.0, cur_iter=7, last_overflow_iter=3, cur_hysteresis=2, scale_window=1000
    )
    wrapper = SimpleNamespace(
        optimizer=base, param_groups=base.param_groups, fp16_groups=halves, loss_scale_config=scale
    )
    return SimpleNamespace(
        module=model, optimizer=wrapper, zero_optimization_stage=engine.zero_optimization_stage
    )


def test_in_half_precision_the_fp32_weights_are_saved_and_the_models_follow(
    tmp_path, make_engine, together
):
    plain = make_engine()
    engine, other = half_precision(plain), half_precision(make_engine(seed=1, steps=0))
    dealt = shares(engine, together, 2)
    assert {tensor.dtype for share in dealt for tensor in share.values()} == {torch.float32}
    shared = json.loads(json.dumps(fragments.scalars(engine)))
    other.optimizer.loss_scale_config.cur_scale = 1.0
    fragments.load(other, reopened(tmp_path, dealt), shared)
    for (name, half), kinds in zip(
        other.module.named_parameters(), state(plain).values(), strict=True
    ):
        assert half.dtype == torch.bfloat16
        assert half.equal(kinds["weight"].bfloat16()), name
    masters = [p for group in other.optimizer.param_groups for p in group["params"]]
    for master, kinds in zip(masters, state(plain).values(), strict=True):
        assert is_equal(
            {"weight": master.detach(), **other.optimizer.optimizer.state[master]}, kinds
        )
    assert vars(other.optimizer.loss_scale_config) == vars(engine.optimizer.loss_scale_config)
