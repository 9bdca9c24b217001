"""One micro step: the loss of a micro batch across all ranks, and its gradient."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shards import Batch
from t5vae.cluster.agreement import all_sum
from t5vae.config import Config
from t5vae.model import Regularisers, row_keys
from t5vae.objective import PendingMMD, sliced_epps_pulley, start_gather
from t5vae.training.profiling import phase


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
        nonfinite_ranks: whose loss is not finite.
    """

    nll: float
    mmd: float
    epps_pulley: float
    codes_BD: Tensor
    nonfinite_ranks: list[int] = field(default_factory=list)


def micro_step(
    engine: Any, batch: Batch, micro: int, step: Step, config: Config, device: torch.device
) -> Losses:
    """Forward and backward pass of one micro batch; all ranks call it together.

    Where the loss of any rank is not finite, no gradient of any rank is either: DeepSpeed then
    discards the whole step, on all ranks and with all its micro batches.
    """
    regularisation, other = config.objective.mmd, config.objective.epps_pulley
    draw = (config.run.seed << 40) + step.position + micro
    weights_B = batch.weights.to(device, non_blocking=True)
    gathering = _Gathering(weights_B)
    ids_BT = batch.ids.to(device, non_blocking=True)
    with phase("forward"):
        output = engine(
            ids_BT,
            labels=ids_BT.masked_fill(weights_B[:, None] == 0, -100),
            mode="score",
            regularisers=_regularisers(config, batch, step.position, device),
            on_latent=gathering,
        )
    with phase("mmd"):
        mmd = gathering.pending.finish(
            kernel=regularisation.kernel,
            prior=regularisation.prior,
            estimator=regularisation.estimator,
            sigma=regularisation.sigma,
            implementation=regularisation.implementation,
            generator_seed=draw,
        )
    nll = output.loss * real_tokens(batch)
    own = bool(nll.isfinite() & output.latent.isfinite().all())
    all_nll, infinite = all_sum(nll.item(), not (own and mmd.isfinite()), device=device)
    # DeepSpeed divides by ranks and micro steps; the sum over all tokens must not be.
    per_token = config.objective.reconstruction == "mean"
    loss = nll * (step.parts / (step.tokens if per_token else 1)) + step.mmd_weight * mmd
    if infinite or not math.isfinite(all_nll):
        _backward(engine, loss * math.nan)
        return Losses(math.nan, math.nan, math.nan, output.latent.detach(), _ranks_where(not own))
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
    _backward(engine, loss)
    return Losses(all_nll, mmd.item(), epps_pulley, output.latent.detach())


def _backward(engine: Any, loss: Tensor) -> None:
    with phase("backward"):
        engine.backward(loss)


def _ranks_where(true: bool) -> list[int]:
    """The ranks that say so; all of them where none does, since the fault is in what they share."""
    said: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(said, true)
    return [rank for rank, yes in enumerate(said) if yes] or list(range(len(said)))


def step_metrics(losses: list[Losses], step: Step, config: Config) -> dict[str, float]:
    """What a step's micro steps come to, over all ranks."""
    nll = sum(part.nll for part in losses)
    mmd = sum(part.mmd for part in losses) / len(losses)
    other = config.objective.epps_pulley.weight
    epps_pulley = sum(part.epps_pulley for part in losses) / len(losses)
    per_token = config.objective.reconstruction == "mean"
    reconstruction = nll / (step.tokens if per_token else 1)
    return {
        "loss": reconstruction + step.mmd_weight * mmd + other * epps_pulley,
        "reconstruction": reconstruction,
        "nats_per_token": nll / step.tokens,
        "nats_per_sequence": nll / config.data.global_batch_size,
        "mmd": mmd,
        "mmd_weight": step.mmd_weight,
        **({"epps_pulley": epps_pulley} if other else {}),
    }


def latent_diagnostics(losses: list[Losses]) -> dict[str, float]:
    """How this rank's codes of a step compare with N(0, I), for which it is about 1, 1 and 0.

    Returns:
        latent_variance: mean over the coordinates; latent_square: mean |z|^2 / D;
        latent_saturated: share of coordinates beyond 0.99 in size and below 1, as tanh leaves them.
    """
    z_BD = torch.cat([part.codes_BD for part in losses]).float()
    size = z_BD.abs()
    return {
        "latent_variance": z_BD.var(0).mean().item(),
        "latent_square": z_BD.square().mean().item(),
        "latent_saturated": ((size > 0.99) & (size <= 1)).float().mean().item(),
    }


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
