"""What the benchmarks take of the inside of a training step: its noise, its loss, its sums.

Shapes: B sequences of this rank, D latent size.
"""

from typing import Any

import _report  # noqa: F401 (makes `shards` the package)
import torch
from torch import Tensor

from shards import Batch
from t5vae.cluster.agreement import all_sum
from t5vae.config import Config, Objective
from t5vae.model import Regularisers, row_keys
from t5vae.model.noise import NOISE, keyed_normal
from t5vae.training.engine import backward
from t5vae.training.job import Job
from t5vae.training.outcome import Arriving, Outcome, Outcomes
from t5vae.training.step import Loss, real_tokens


def noise_of(batch: Batch, config: Config, device: torch.device) -> Regularisers:
    """A batch's latent noise, and nothing else that regularises."""
    keys_B = row_keys(config.run.seed, 0, batch.sequence.to(device))
    return Regularisers(keys_B, latent_noise=config.objective.latent_noise)


def with_noise(z_BD: Tensor, batch: Batch, config: Config) -> Tensor:
    keys_B = row_keys(config.run.seed, 0, batch.sequence.to(z_BD.device))
    noise_BD = keyed_normal(keys_B, z_BD.shape[1], NOISE).to(z_BD.dtype)
    return z_BD + config.objective.latent_noise * noise_BD


def loss_of(config: Config, ranks: int, device: torch.device) -> Loss:
    return Loss(config.objective, config.run.seed, config.data.split(ranks), device)


def weights_of(objective: Objective) -> dict[str, float]:
    """Of its terms, once their schedules have risen."""
    return {name: term.weight for name, term in objective.terms.items()}


def whole_loss(loss: Loss, engine: Any, batch: Batch, tokens: float) -> Tensor:
    """Of a step of one micro batch, where the global batch has so many real tokens."""
    loss.begin(0, tokens, weights_of(loss.objective))
    return loss(engine, batch, 0)


def sums(batch: Batch, outcomes: Outcomes) -> float:
    """What ranks tell each other before a step; the real tokens of all."""
    tokens, *rest = all_sum(real_tokens(batch), 0, False, False, 0, False, *outcomes.told())
    outcomes.heard(rest[5:])
    return tokens


def take_step(loss: Loss, engine: Any, batch: Batch, outcomes: Outcomes) -> Outcome:
    """A run's step with its sums over ranks, but for data, schedule and log; what it came to."""
    backward(engine, whole_loss(loss, engine, batch, sums(batch, outcomes)))
    engine.step()
    return loss.end(1, True, None, {})


class Sums:
    """What ranks tell each other in a step, on random codes."""

    def __init__(self, job: Job, device: torch.device):
        self.loss = loss_of(job.config, job.ranks.world_size, device)
        self.outcomes = Outcomes(self.loss.shares)
        self.codes_BD = torch.randn(job.split.micro, job.settings.latent_size, device=device)

    def outcome(self) -> Outcome:
        self.loss.begin(0, 1.0, dict.fromkeys(self.loss.terms, 0.0))
        self.loss.codes.append(self.codes_BD)
        self.loss.arriving = Arriving(self.codes_BD.new_zeros(len(self.loss.logs) + 1).double())
        return self.loss.end(1, True, None, {})

    def exchange(self, batch: Batch) -> None:
        sums(batch, self.outcomes)
        for past in self.outcomes.after(self.outcome(), wait=False):
            past.figures()
