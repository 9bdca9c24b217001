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
