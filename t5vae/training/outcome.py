"""What steps came to, which the host learns while the device is at the next one."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from t5vae.cluster.agreement import all_sum, gather_objects
from t5vae.config import BatchSplit
from t5vae.objective import Term


class Arriving:
    """Numbers on their way from a device to the host, or there already: [numbers]."""

    def __init__(self, numbers: Tensor | float):
        self.event = None
        if not isinstance(numbers, Tensor):
            numbers = torch.tensor(numbers, dtype=torch.float64)
        self.host = numbers = numbers.detach().view(-1)
        if numbers.device.type != "cpu":
            self.host = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self.host.copy_(numbers, non_blocking=True)
            self.event = torch.accelerator.current_stream(numbers.device).record_event()

    def read(self) -> list[float]:
        """Wait for them."""
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()


@dataclass
class Outcome:
    """What a step came to.

    Attributes:
        step: its number.
        position: of the stream before it.
        applied: whether the weights were updated.
        about: figures of it that the host knew.
        terms: of the objective.
        weights: of the terms in the loss.
        split: how the global batch is dealt.
        tokens: real tokens of the global batch.
        unit: what a sum over the global batch is divided by in the loss.
        codes: this rank's of each micro batch, [B, D].
        names: of the numbers: "nll", the cross-entropy in nats, and what terms log; "own", 0, or
            NaN where this rank's own share is not finite.
        shares: how many of them, the first, are this rank's share of a sum over ranks.
        numbers: sums over its micro batches.
        norm: of the gradient; None where it is not known.
        sums: the shares of all ranks, once they have told each other.
    """

    step: int
    position: int
    applied: bool
    about: Mapping[str, float]
    terms: Mapping[str, Term]
    weights: Mapping[str, float]
    split: BatchSplit
    tokens: float
    unit: float
    codes: list[Tensor]
    names: tuple[str, ...]
    shares: int
    numbers: Arriving
    norm: Arriving | None
    sums: list[float] | None = None

    @property
    def own_shares(self) -> list[float]:
        """This rank's."""
        return self._own[: self.shares]

    @cached_property
    def _own(self) -> list[float]:
        return self.numbers.read()

    @cached_property
    def _found(self) -> dict[str, float]:
        """By name, of all ranks."""
        assert self.sums is not None
        return dict(zip(self.names, self.sums + self._own[self.shares :], strict=True))

    @property
    def is_finite(self) -> bool:
        """Whether the loss was, on all ranks, which agree in it."""
        return all(math.isfinite(x) for name, x in self._found.items() if name != "own")

    def nonfinite_ranks(self) -> list[int]:
        """Whose share of the loss was not finite; all ranks ask together.

        All of them where no share is to blame: the fault is in what they have in common.
        """
        if self.is_finite:
            return []
        said = gather_objects(math.isfinite(self._found["own"]))
        to_blame = [rank for rank, finite in enumerate(said) if not finite]
        return to_blame or list(range(self.split.ranks))

    def figures(self) -> dict[str, float]:
        """Of all ranks; NaN where a loss was not finite, and the norm where it was not applied."""
        sums = self._found if self.is_finite else dict.fromkeys(self.names, math.nan)
        loss = reconstruction = sums["nll"] / self.unit
        of_terms: dict[str, float] = {}
        for name, term in self.terms.items():
            among = self.split.sequences if term.per_sequence else len(self.codes)
            of_terms |= {log: sums[log] / among for log in term.logs}
            if term.has_schedule:
                of_terms[f"{name}_weight"] = self.weights[name]
            divisor = self.unit if term.per_sequence else len(self.codes)
            loss += self.weights[name] * (sums[term.logs[0]] / divisor)
        norms = {}
        if self.norm is not None:
            (norm,) = self.norm.read()
            norms = {"grad_norm": norm if self.applied else math.nan}
        return {
            "loss": loss,
            "reconstruction": reconstruction,
            "nats_per_token": sums["nll"] / self.tokens,
            "nats_per_sequence": sums["nll"] / self.split.sequences,
            **of_terms,
            **norms,
            **self.about,
        }

    def latent_diagnostics(self) -> dict[str, float]:
        """How this rank's codes compare with N(0, I), for which it is about 1, 1 and 0.

        Returns:
            latent_variance: mean over the coordinates; latent_square: mean |z|^2 / D;
            latent_saturated: share of coordinates beyond 0.99 in size and below 1, as tanh leaves
            them.
        """
        z_BD = torch.cat(self.codes).float()
        size = z_BD.abs()
        found = {
            "latent_variance": z_BD.var(0).mean(),
            "latent_square": z_BD.square().mean(),
            "latent_saturated": ((size > 0.99) & (size <= 1)).float().mean(),
        }
        return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))


class Outcomes:
    """Those of the last steps, a step late, so that nobody waits for a device that is at work.

    Args:
        shares: of an outcome.
    """

    def __init__(self, shares: int):
        self.shares = shares
        self.arriving: list[Outcome] = []

    def told(self) -> list[float]:
        """This rank's shares of the last outcome, to be summed with what ranks tell each other."""
        return self.arriving[-1].own_shares if self.arriving else [0.0] * self.shares

    def heard(self, sums: list[float]) -> None:
        """All ranks' shares of it."""
        if self.arriving:
            self.arriving[-1].sums = sums

    def after(self, outcome: Outcome, *, wait: bool) -> Iterator[Outcome]:
        """Those that are known after one more, the oldest first; all ranks call it together.

        Args:
            outcome: of the step that was taken last.
            wait: for this one too.
        """
        self.arriving.append(outcome)
        if wait:
            self.heard(all_sum(*self.told()))
        while len(self.arriving) > (0 if wait else 1):
            yield self.arriving.pop(0)
