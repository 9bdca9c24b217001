"""One micro step: the loss of a micro batch across all ranks, and its gradient."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shards import Batch, UserError
from t5vae.config import Config
from t5vae.model import Regularisers, row_keys
from t5vae.objective import PendingMMD, sliced_epps_pulley, start_gather
from t5vae.training.distributed import all_sum


@dataclass(frozen=True)
class Step:
    """What the micro steps of one step share.

    Attributes:
        number: of the step, from 1.
        position: of the stream before the step.
        tokens: real tokens of the global batch.
        mmd_weight: of MMD^2 in the loss.
        parts: ranks times micro steps.
    """

    number: int
    position: int
    tokens: float
    mmd_weight: float
    parts: int


@dataclass(frozen=True)
class Losses:
    """What a micro step found.

    Attributes:
        nll: summed cross-entropy in nats, over all ranks.
        mmd, epps_pulley: of the codes of all ranks; 0 where the latter has no weight.
        codes_BD: this rank's codes, without gradient.
    """

    nll: float
    mmd: float
    epps_pulley: float
    codes_BD: Tensor


def micro_step(
    engine: Any, batch: Batch, micro: int, step: Step, config: Config, device: torch.device
) -> Losses:
    """Forward and backward pass of one micro batch; all ranks call it together.

    Raises:
        UserError: on all ranks, where the loss of one is not finite.
    """
    regularisation, other = config.objective.mmd, config.objective.epps_pulley
    draw = (config.run.seed << 40) + step.position + micro
    weights_B = batch.weights.to(device, non_blocking=True)
    gathering = _Gathering(weights_B)
    ids_BT = batch.ids.to(device, non_blocking=True)
    output = engine(
        ids_BT,
        labels=ids_BT.masked_fill(weights_B[:, None] == 0, -100),
        mode="score",
        regularisers=_regularisers(config, batch, step.position, device),
        on_latent=gathering,
    )
    mmd = gathering.pending.finish(
        kernel=regularisation.kernel,
        prior=regularisation.prior,
        estimator=regularisation.estimator,
        sigma=regularisation.sigma,
        implementation=regularisation.implementation,
        generator_seed=draw,
    )
    nll = output.loss * real_tokens(batch)
    all_nll, infinite = all_sum(nll.item(), not mmd.isfinite(), device=device)
    if infinite or not math.isfinite(all_nll):
        raise UserError(
            f"the loss of step {step.number} is not finite (the batch from position "
            f"{step.position:,}); the checkpoints before it are untouched: lower optim.lr, or "
            "use another train.precision"
        )
    # DeepSpeed divides by ranks and micro steps; the sum over all tokens must not be.
    per_token = config.objective.reconstruction == "mean"
    loss = nll * (step.parts / (step.tokens if per_token else 1)) + step.mmd_weight * mmd
    epps_pulley = 0.0
    if other.weight:
        statistic = sliced_epps_pulley(
            output.latent,
            slices=other.slices,
            axes=other.axes,
            sigma=regularisation.sigma,
            weights_B=weights_B,
            generator_seed=draw,
        )
        loss = loss + other.weight * statistic
        epps_pulley = statistic.item()
    engine.backward(loss)
    return Losses(all_nll, mmd.item(), epps_pulley, output.latent.detach())


def real_tokens(batch: Batch) -> float:
    """Tokens that count, end tokens included."""
    return float((batch.lengths * batch.weights).sum())


class _Gathering:
    """Starts gathering the codes as soon as the model knows them."""

    pending: PendingMMD

    def __init__(self, weights_B: Tensor):
        self.weights_B = weights_B

    def __call__(self, z_BD: Tensor) -> None:
        self.pending = start_gather(z_BD, weights_B=self.weights_B, equal_rows=True)


def _regularisers(
    config: Config, batch: Batch, position: int, device: torch.device
) -> Regularisers:
    number_B = batch.sequence + (batch.source << 40)
    return Regularisers(
        row_keys(config.run.seed, position, number_B.to(device)),
        latent_noise=config.objective.latent_noise,
        input_mask=config.objective.input_mask,
        word_dropout=config.objective.word_dropout,
    )
