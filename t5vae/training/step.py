"""The loss of micro batches across all ranks: reconstruction, and regularisation of the codes."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function as phase

from shards import Batch
from t5vae.cluster.agreement import all_sum
from t5vae.config import BatchSplit, Objective
from t5vae.model import Regularisers, row_keys
from t5vae.objective import PendingMMD, sliced_epps_pulley, start_gather


@dataclass(frozen=True)
class Found:
    """What a micro batch came to.

    Attributes:
        nll: summed cross-entropy in nats, over all ranks.
        mmd, epps_pulley: of the codes of all ranks; 0 where the latter has no weight.
        codes_BD: this rank's codes, without gradient.
    """

    nll: float
    mmd: float
    epps_pulley: float
    codes_BD: Tensor


class Loss:
    """The loss of a step's micro batches, one after the other; all ranks call it together.

    Where the loss of any rank is not finite, no gradient of any rank is either: DeepSpeed then
    discards the whole step, on all ranks and with all its micro batches.

    Args:
        objective: what is minimised.
        seed: of the run; what is drawn is a function of it and of the position.
        split: how the global batch is dealt.
        device: this rank's.

    Attributes:
        nonfinite_ranks: whose loss was not finite in this step.
    """

    def __init__(self, objective: Objective, seed: int, split: BatchSplit, device: torch.device):
        self.objective, self.seed, self.split, self.device = objective, seed, split, device

    def begin(self, position: int, tokens: float, mmd_weight: float) -> None:
        """Begin a step.

        Args:
            position: of the stream before it.
            tokens: real tokens of the global batch.
            mmd_weight: of MMD^2 in the loss.
        """
        self.position, self.tokens, self.mmd_weight = position, tokens, mmd_weight
        self.found: list[Found] = []
        self.nonfinite_ranks: set[int] = set()

    def __call__(self, engine: Any, batch: Batch, micro: int) -> Tensor:
        """Forward pass of one micro batch, the `micro`-th of this rank; what to go back from."""
        weights_B = batch.weights.to(self.device, non_blocking=True)
        gathering = _Gathering(weights_B)
        ids_BT = batch.ids.to(self.device, non_blocking=True)
        with phase("forward"):
            output = engine(
                ids_BT,
                labels=ids_BT.masked_fill(weights_B[:, None] == 0, -100),
                mode="score",
                regularisers=self._regularisers(batch),
                on_latent=gathering,
            )
        regularisation = self.objective.mmd
        draw = (self.seed << 40) + self.position + micro
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
        sums = all_sum(nll.item(), not (own and mmd.isfinite()), device=self.device)
        all_nll, infinite = sums
        # DeepSpeed divides by ranks and micro steps; the sum over all tokens must not be.
        per_token = self.objective.reconstruction == "mean"
        loss = nll * (self.split.parts / (self.tokens if per_token else 1)) + self.mmd_weight * mmd
        codes_BD = output.latent.detach()
        if infinite or not math.isfinite(all_nll):
            self.nonfinite_ranks |= _ranks_where(not own)
            self.found.append(Found(math.nan, math.nan, math.nan, codes_BD))
            return loss * math.nan
        epps_pulley, other = 0.0, self.objective.epps_pulley
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
        self.found.append(Found(all_nll, mmd.item(), epps_pulley, codes_BD))
        return loss

    def _regularisers(self, batch: Batch) -> Regularisers:
        number_B = batch.sequence + (batch.source << 40)
        return Regularisers(
            row_keys(self.seed, self.position, number_B.to(self.device)),
            latent_noise=self.objective.latent_noise,
            input_mask=self.objective.input_mask,
            word_dropout=self.objective.word_dropout,
        )

    def figures(self) -> dict[str, float]:
        """What the step's micro batches come to, over all ranks."""
        nll = sum(part.nll for part in self.found)
        mmd = sum(part.mmd for part in self.found) / len(self.found)
        other = self.objective.epps_pulley.weight
        epps_pulley = sum(part.epps_pulley for part in self.found) / len(self.found)
        per_token = self.objective.reconstruction == "mean"
        reconstruction = nll / (self.tokens if per_token else 1)
        return {
            "loss": reconstruction + self.mmd_weight * mmd + other * epps_pulley,
            "reconstruction": reconstruction,
            "nats_per_token": nll / self.tokens,
            "nats_per_sequence": nll / self.split.sequences,
            "mmd": mmd,
            "mmd_weight": self.mmd_weight,
            **({"epps_pulley": epps_pulley} if other else {}),
        }

    def latent_diagnostics(self) -> dict[str, float]:
        """How this rank's codes of the step compare with N(0, I), for which it is about 1, 1 and 0.

        Returns:
            latent_variance: mean over the coordinates; latent_square: mean |z|^2 / D;
            latent_saturated: share of coordinates beyond 0.99 in size and below 1, as tanh leaves
            them.
        """
        z_BD = torch.cat([part.codes_BD for part in self.found]).float()
        size = z_BD.abs()
        return {
            "latent_variance": z_BD.var(0).mean().item(),
            "latent_square": z_BD.square().mean().item(),
            "latent_saturated": ((size > 0.99) & (size <= 1)).float().mean().item(),
        }


def real_tokens(batch: Batch) -> float:
    """Tokens that count, end tokens included."""
    return float((batch.lengths * batch.weights).sum())


def _ranks_where(true: bool) -> set[int]:
    """The ranks that say so; all of them where none does, since the fault is in what they share."""
    said: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(said, true)
    return {rank for rank, yes in enumerate(said) if yes} or set(range(len(said)))


class _Gathering:
    """Starts gathering the codes as soon as the model knows them."""

    pending: PendingMMD

    def __init__(self, weights_B: Tensor):
        self.weights_B = weights_B

    def __call__(self, z_BD: Tensor) -> None:
        self.pending = start_gather(z_BD, weights_B=self.weights_B, equal_rows=True)
