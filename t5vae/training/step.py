"""The loss of micro batches across all ranks: reconstruction, and the terms of the objective."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shards import Batch
from shards.read.order import key_state
from t5vae.cluster.agreement import all_sum
from t5vae.cluster.phases import phase
from t5vae.common.seeds import FIRST_SEED, LAST_SEED
from t5vae.config import BatchSplit, Objective
from t5vae.model import Regularisers, row_keys
from t5vae.objective import Codes, Gathering, start_gather


@dataclass(frozen=True)
class Found:
    """What a micro batch came to.

    Attributes:
        codes_BD: this rank's codes, without gradient.
        figures: over all ranks: "nll", the summed cross-entropy in nats, and what terms log; NaN
            where a loss was not finite.
    """

    codes_BD: Tensor
    figures: dict[str, float]


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
        self.terms = objective.computed
        self.logs = [log for term in self.terms.values() for log in term.logs]
        self.gathers = any("gathered" in term.needs for term in self.terms.values())

    def begin(self, position: int, tokens: float, weights: Mapping[str, float]) -> None:
        """Begin a step.

        Args:
            position: of the stream before it.
            tokens: real tokens of the global batch.
            weights: of the terms in the loss.
        """
        self.position, self.tokens, self.weights = position, tokens, weights
        self.found: list[Found] = []
        self.nonfinite_ranks: set[int] = set()

    @property
    def unit(self) -> float:
        """What a sum over the global batch is divided by in the loss: real tokens, or nothing."""
        return self.tokens if self.objective.reconstruction == "mean" else 1

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
                on_latent=gathering if self.gathers else None,
            )
        codes = Codes(
            output.latent,
            weights_B,
            scale=self.objective.scale,
            seed=seed_at(self.seed, self.position + micro),
            gathering=gathering.started,
            mean_BD=output.mean,
            log_variance_BD=output.log_variance,
        )
        codes_BD, nll = output.latent.detach(), output.loss * real_tokens(batch)
        sums = {"nll": nll, **self._values(codes, per_sequence=True)}
        finite, *read = _read(codes_BD.isfinite().all(), *sums.values())
        own = bool(finite) and all(map(math.isfinite, read))
        infinite, *read = all_sum(not own, *read)
        statistics = {} if infinite else self._values(codes, per_sequence=False)
        read += _read(*statistics.values())
        if infinite or not all(map(math.isfinite, read)):
            if codes.gathering:
                codes.gathering.everyone()  # which may be under way
            self.nonfinite_ranks |= _ranks_where(not own)
            self.found.append(Found(codes_BD, dict.fromkeys(("nll", *self.logs), math.nan)))
            return nll * math.nan
        values = sums | statistics
        self.found.append(Found(codes_BD, dict(zip(values, read, strict=True))))
        # DeepSpeed divides by ranks and micro steps; a sum over the global batch must not be.
        share = self.split.parts / self.unit
        loss = nll * share
        for name, term in self.terms.items():
            value = values[term.logs[0]]
            loss = loss + self.weights[name] * (value * share if term.per_sequence else value)
        return loss

    def _values(self, codes: Codes, *, per_sequence: bool) -> dict[str, Tensor]:
        """What terms log, of one kind of them."""
        values: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            if term.per_sequence == per_sequence:
                with phase(name):
                    values |= zip(term.logs, term.values(codes), strict=True)
        return values

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
        sums = {
            name: sum(part.figures[name] for part in self.found) for name in ("nll", *self.logs)
        }
        loss = reconstruction = sums["nll"] / self.unit
        of_terms: dict[str, float] = {}
        for name, term in self.terms.items():
            parts = len(self.found)
            among = self.split.sequences if term.per_sequence else parts
            of_terms |= {log: sums[log] / among for log in term.logs}
            if term.has_schedule:
                of_terms[f"{name}_weight"] = self.weights[name]
            minimised = sums[term.logs[0]] / (self.unit if term.per_sequence else parts)
            loss += self.weights[name] * minimised
        return {
            "loss": loss,
            "reconstruction": reconstruction,
            "nats_per_token": sums["nll"] / self.tokens,
            "nats_per_sequence": sums["nll"] / self.split.sequences,
            **of_terms,
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


def seed_at(seed: int, position: int) -> int:
    """Of what terms draw in a micro batch, no more than the 64 bits that torch takes.

    Args:
        seed: of the run.
        position: in the stream, another in every micro batch.
    """
    own = (seed << 40) + position
    return own if FIRST_SEED <= own <= LAST_SEED else int(key_state(seed, position))


def real_tokens(batch: Batch) -> float:
    """Tokens that count, end tokens included."""
    return float((batch.lengths * batch.weights).sum())


def _read(*scalars: Tensor) -> list[float]:
    """Numbers of the device, at once."""
    return torch.stack(scalars).tolist() if scalars else []


def _ranks_where(true: bool) -> set[int]:
    """The ranks that say so; all of them where none does, since the fault is in what they share."""
    said: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(said, true)
    return {rank for rank, yes in enumerate(said) if yes} or set(range(len(said)))


class _Gathering:
    """Starts gathering the codes as soon as the model knows them."""

    started: Gathering | None = None

    def __init__(self, weights_B: Tensor):
        self.weights_B = weights_B

    def __call__(self, z_BD: Tensor) -> None:
        self.started = start_gather(z_BD, weights_B=self.weights_B, equal_rows=True)
