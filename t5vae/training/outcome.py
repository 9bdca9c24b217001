"""What steps came to, which the host learns while the device is at the next one."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from t5vae.cluster.agreement import gather_objects
from t5vae.config import BatchSplit
from t5vae.objective import Term


class Arriving:
    """Numbers on their way from a device to the host, float64 [numbers]."""

    def __init__(self, numbers: Tensor):
        self.event = None
        self.host = numbers
        if numbers.device.type != "cpu":
            self.host = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self.host.copy_(numbers, non_blocking=True)
            self.event = torch.accelerator.current_stream(numbers.device).record_event()

    def read(self) -> list[float]:
        """Wait for them."""
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()


@dataclass(frozen=True)
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
        norm: of the gradient, where the host knows it.
        names: of the numbers.
        arriving: sums over the micro batches, and over the ranks of what they have shares of:
            "nll", the cross-entropy in nats, and what terms log; "own", 0, or NaN where this rank's
            own share is not finite; "norm", of the gradient where the device knows it.
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
    norm: float | None
    names: tuple[str, ...]
    arriving: Arriving

    @cached_property
    def numbers(self) -> dict[str, float]:
        """By name, once they are there."""
        return dict(zip(self.names, self.arriving.read(), strict=True))

    @property
    def is_finite(self) -> bool:
        """Whether the loss was, on all ranks, which agree in it."""
        apart = ("own", "norm")
        return all(math.isfinite(x) for name, x in self.numbers.items() if name not in apart)

    def nonfinite_ranks(self) -> list[int]:
        """Whose share of the loss was not finite; all ranks ask together.

        All of them where no share is to blame: the fault is in what they have in common.
        """
        if self.is_finite:
            return []
        said = gather_objects(math.isfinite(self.numbers["own"]))
        to_blame = [rank for rank, finite in enumerate(said) if not finite]
        return to_blame or list(range(self.split.ranks))

    def figures(self) -> dict[str, float]:
        """Of all ranks; NaN where a loss was not finite, and the norm where it was not applied."""
        sums = self.numbers if self.is_finite else dict.fromkeys(self.names, math.nan)
        loss = reconstruction = sums["nll"] / self.unit
        of_terms: dict[str, float] = {}
        for name, term in self.terms.items():
            among = self.split.sequences if term.per_sequence else len(self.codes)
            of_terms |= {log: sums[log] / among for log in term.logs}
            if term.has_schedule:
                of_terms[f"{name}_weight"] = self.weights[name]
            divisor = self.unit if term.per_sequence else len(self.codes)
            loss += self.weights[name] * (sums[term.logs[0]] / divisor)
        norm = self.numbers.get("norm", self.norm)
        norms = {} if norm is None else {"grad_norm": norm if self.applied else math.nan}
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
    """Those of the last steps, a step late, so that nobody waits for a device that is at work."""

    def __init__(self) -> None:
        self.arriving: list[Outcome] = []

    def after(self, outcome: Outcome, *, wait: bool) -> Iterator[Outcome]:
        """Those that are known after one more, the oldest first.

        Args:
            outcome: of the step that was taken last.
            wait: for this one too.
        """
        self.arriving.append(outcome)
        while len(self.arriving) > (0 if wait else 1):
            yield self.arriving.pop(0)
