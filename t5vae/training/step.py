"""The loss of micro batches across all ranks: reconstruction, and the terms of the objective."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards import Batch
from shards.read.order import key_state
from t5vae.cluster.phases import phase
from t5vae.common.seeds import FIRST_SEED, LAST_SEED
from t5vae.config import BatchSplit, Objective
from t5vae.model import Regularisers, row_keys
from t5vae.objective import Codes, Gathering, start_gather
from t5vae.training.outcome import Arriving, Outcome


class Loss:
    """The loss of a step's micro batches, one after the other; all ranks call it together.

    It asks an accelerator nothing, so that the host runs ahead of it: what a step came to is on its
    way when the step ends. Where the loss of a rank is not finite, neither is any gradient of it,
    nor of those that are reduced: DeepSpeed then discards the whole step, on all ranks and with all
    its micro batches.

    Args:
        objective: what is minimised.
        seed: of the run; what is drawn is a function of it and of the position.
        split: how the global batch is dealt.
        device: this rank's.
    """

    def __init__(self, objective: Objective, seed: int, split: BatchSplit, device: torch.device):
        self.objective, self.seed, self.split, self.device = objective, seed, split, device
        self.terms = objective.computed
        of_ranks = [log for term in self.terms.values() if term.per_sequence for log in term.logs]
        of_all = [log for term in self.terms.values() if not term.per_sequence for log in term.logs]
        self.shares, self.logs = 1 + len(of_ranks), ("nll", *of_ranks, *of_all)
        self.gathers = any("gathered" in term.needs for term in self.terms.values())

    def begin(
        self,
        position: int,
        tokens: float,
        weights: Mapping[str, float],
        counting: Sequence[np.ndarray] | None = None,
    ) -> None:
        """Begin a step.

        Args:
            position: of the stream before it.
            tokens: real tokens of the global batch.
            weights: of the terms in the loss.
            counting: bool [W, B] for each micro batch, which rows of all ranks count; None where
                all do.
        """
        self.position, self.tokens, self.weights = position, tokens, weights
        self.counting = counting
        self.codes: list[Tensor] = []
        self.numbers: list[Tensor] = []
        self.arriving: Arriving | None = None

    @property
    def unit(self) -> float:
        """What a sum over the global batch is divided by in the loss: real tokens, or nothing."""
        return self.tokens if self.objective.reconstruction == "mean" else 1

    def __call__(self, engine: Any, batch: Batch, micro: int) -> Tensor:
        """Forward pass of one micro batch, the `micro`-th of this rank; what to go back from."""
        batch = batch.to(self.device)
        counting_WB = self.counting[micro] if self.counting else None
        gathering = _Gathering(counting_WB)
        with phase("forward"):
            output = engine(
                batch.ids,
                labels=batch.ids.masked_fill(batch.weights[:, None] == 0, -100),
                places=batch.places,
                mode="score",
                regularisers=self._regularisers(batch),
                on_latent=gathering if self.gathers else None,
            )
        every = self.split.ranks * len(batch.ids)
        codes = Codes(
            output.latent,
            batch.weights,
            scale=self.objective.scale,
            seed=seed_at(self.seed, self.position + micro),
            count=every if counting_WB is None else int(counting_WB.sum()),
            gathering=gathering.started,
            mean_BD=output.mean,
            log_variance_BD=output.log_variance,
        )
        nll = output.loss * real_tokens(batch)
        # DeepSpeed divides by ranks and micro steps; a sum over the global batch must not be.
        share = self.split.parts / self.unit
        loss, logged = nll * share, {"nll": nll}
        for name, term in self.terms.items():
            with phase(name):
                values = term.values(codes)
            logged |= zip(term.logs, values, strict=True)
            loss = loss + self.weights[name] * (values[0] * (share if term.per_sequence else 1))
        return loss * self._noted(output.latent.detach(), logged)

    def _noted(self, codes_BD: Tensor, logged: Mapping[str, Tensor]) -> Tensor:
        """Keep what a micro batch came to; 1, or NaN where any of it is not finite."""
        number_L = torch.stack([logged[name].detach().double() for name in self.logs])
        own = 0 * (number_L[: self.shares].sum() + codes_BD.sum(dtype=torch.float64))
        self.codes.append(codes_BD)
        self.numbers.append(torch.cat([number_L, own[None]]))
        if len(self.numbers) == self.split.accumulation:
            self.arriving = Arriving(torch.stack(self.numbers).sum(0))
        return 1 + (0 * self.numbers[-1].sum()).float()

    def _regularisers(self, batch: Batch) -> Regularisers:
        return Regularisers(
            row_keys(self.seed, self.position, batch.sequence + (batch.source << 40)),
            latent_noise=self.objective.latent_noise,
            input_mask=self.objective.input_mask,
            word_dropout=self.objective.word_dropout,
        )

    def end(
        self, step: int, applied: bool, norm: Tensor | float | None, about: Mapping[str, float]
    ) -> Outcome:
        """End a step, whose numbers are on their way to the host.

        Args:
            step: its number.
            applied: whether the weights were updated.
            norm: of the gradient; None where it is not known.
            about: figures of it that the host has.
        """
        assert self.arriving is not None
        return Outcome(
            step=step,
            position=self.position,
            applied=applied,
            about=about,
            terms=self.terms,
            weights=self.weights,
            split=self.split,
            tokens=self.tokens,
            unit=self.unit,
            codes=self.codes,
            names=(*self.logs, "own"),
            shares=self.shares,
            numbers=self.arriving,
            norm=None if norm is None else Arriving(norm),
        )


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
    return float(len(batch.places))


class _Gathering:
    """Starts gathering the codes as soon as the model knows them."""

    started: Gathering | None = None

    def __init__(self, counting_WB: np.ndarray | None):
        self.counting_WB = counting_WB

    def __call__(self, z_BD: Tensor) -> None:
        self.started = start_gather(z_BD, counting_WB=self.counting_WB)
