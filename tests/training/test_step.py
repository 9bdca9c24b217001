"""The seeds of a step: any that a configuration takes."""

import pytest
import torch

from shards import ShardStream
from t5vae.checkpoint.randomness import seed_everything
from t5vae.training.build import build_model, model_config
from t5vae.training.step import Loss, seed_at

CPU = torch.device("cpu")
DRAWS = {"mmd": {"prior": "sampled"}, "epps_pulley": {"weight": 1.0, "slices": 4}}
NOISE = {"latent_noise": 0.5, "input_mask": 0.1, "word_dropout": 0.1}
SEEDS = [0, -1, 20261130, 2**24, 2**32, 2**63, 2**64 - 1, -(2**63)]


@pytest.mark.parametrize("seed", SEEDS)
def test_any_seed_makes_weights_an_order_and_a_loss(make_config, seed):
    config = make_config(run={"name": "small", "seed": seed}, objective=DRAWS | NOISE)
    dataset = config.data.open()
    settings = model_config(config.model, config.objective, dataset)
    model = build_model(settings, config.model, seed=seed, half=False, device=CPU)
    seed_everything(seed + 1 + (10**6 << 20))  # as a rank does that resumes elsewhere
    with ShardStream(dataset, seed=seed, global_batch_size=16) as stream:
        batch = next(stream)
    loss = Loss(config.objective, seed, config.data.split(1), CPU)
    loss.begin(2**40, float(batch.lengths.sum()), dict.fromkeys(config.objective.computed, 1.0))
    assert loss(model.train(), batch, 0).isfinite()


def test_small_seeds_draw_what_they_always_drew():
    assert seed_at(2**24 - 1, 5) == (2**24 - 1 << 40) + 5
    assert seed_at(-3, 5) == 5 - (3 << 40)


def test_large_seeds_draw_different_numbers_at_every_position():
    drawn = {
        tuple(torch.rand(2, generator=torch.Generator().manual_seed(seed_at(seed, position))))
        for seed in (2**24, 2**24 + 1, 2**33, 2**63)
        for position in (0, 1, 128)
    }
    assert len(drawn) == 12


@pytest.fixture
def step(make_config):
    """Takes a micro step of a small model, and tells its loss, its model and what it came to."""
    config = make_config(objective={"epps_pulley": {"weight": 1.0, "slices": 4}})
    dataset = config.data.open()
    settings = model_config(config.model, config.objective, dataset)
    model = build_model(settings, config.model, seed=0, half=False, device=CPU).train()
    with ShardStream(dataset, seed=0, global_batch_size=16) as stream:
        batch = next(stream)

    def take():
        loss = Loss(config.objective, 0, config.data.split(1), CPU)
        loss.begin(0, float(len(batch.places)), dict.fromkeys(config.objective.computed, 1.0))
        found = loss(model, batch, 0)
        found.backward()
        outcome = loss.end(1, True, None, {})
        outcome.sums = outcome.own_shares  # there is one rank
        return found, outcome

    return model, take


def test_a_step_comes_to_its_loss_and_all_its_terms(step):
    _, take = step
    loss, outcome = take()
    figures = outcome.figures()
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert figures["loss"] == pytest.approx(
        figures["reconstruction"] + figures["mmd"] + figures["epps_pulley"], rel=1e-6
    )
    assert outcome.nonfinite_ranks() == []


def infinite_loss(module, arguments, output):
    output.loss = output.loss + float("inf")


def nan_codes(module, arguments, z_BD):
    return z_BD * float("nan")


@pytest.mark.parametrize("where", ["loss", "codes"])
def test_no_gradient_is_finite_where_the_loss_is_not(step, where):
    model, take = step
    if where == "loss":  # whose own gradient is finite
        model.register_forward_hook(infinite_loss)
    else:
        model.bottleneck.to_latent.register_forward_hook(nan_codes)
    loss, outcome = take()
    assert not loss.isfinite()
    assert not outcome.is_finite
    assert not any(weight.grad.isfinite().any() for weight in model.bottleneck.parameters())
