"""What a term of the objective is: its settings, what it needs, what it says, what it costs.

Shapes: b codes of this rank (B), N codes of the global batch, D latent size.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import Field

from t5vae.common.section import Section

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from t5vae.objective.gathering import Gathering

Need = Literal["gathered", "posterior"]


@dataclass(frozen=True)
class Codes:
    """The codes of a micro batch, as terms see them.

    Attributes:
        z_BD: of this rank, with gradient.
        weights_B: 0 for rows that do not count, 1 for others.
        scale: standard deviation of the prior.
        seed: of what a term draws; another in every micro batch, the same on every rank.
        count: N, rows of the global batch that count.
        gathering: of the codes of all ranks, under way; for terms that need "gathered".
        mean_BD, log_variance_BD: float32, of the posterior; for terms that need "posterior".
    """

    z_BD: "Tensor"
    weights_B: "Tensor"
    scale: float
    seed: int
    count: int
    gathering: "Gathering | None" = None
    mean_BD: "Tensor | None" = None
    log_variance_BD: "Tensor | None" = None


@dataclass(frozen=True)
class Cost:
    """What a term costs a rank in a micro step.

    Attributes:
        operations: floating-point, forward and backward together.
        memory: bytes at once.
        sent: bytes that it gathers or scatters, of which a ring sends (W - 1) / W.
    """

    operations: int
    memory: int
    sent: int


Tile = tuple[int, ...]


class Tiling(Protocol):
    """Ways to compute a term that sum in another order each."""

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """A name for each, fit for JSON as a list."""

    def milliseconds(self, rows: int, columns: int, device: "torch.device") -> list[float]:
        """What each takes, of b = rows and N = columns."""

    def use(self, tile: Tile) -> None:
        """Compute so from now on, in this process."""


class Term(Section, ABC):
    """A term: a section of `objective` in the configuration, under its name in `TERMS`.

    Attributes:
        needs: "gathered", the codes of all ranks, and "posterior", the parameters of what a code is
            drawn from.
        per_sequence: whether its values are sums over this rank's rows, which ranks add up as they
            do cross-entropies, in nats, weighed as those are and logged per sequence. Else they are
            statistics of the global batch, equal on every rank, whose gradient is that of one
            process times the number of ranks.
        shown: how a line for people shows its value; None where it does not.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    per_sequence: ClassVar[bool] = False
    shown: ClassVar[str | None] = None

    weight: float = Field(default=0.0, ge=0)
    """Of it in the loss; 0 for none."""

    @property
    def is_on(self) -> bool:
        """Whether it is computed, and logged."""
        return self.weight > 0

    @property
    @abstractmethod
    def logs(self) -> tuple[str, ...]:
        """Names in the log of what it comes to, of which the first is minimised."""

    @property
    def has_schedule(self) -> bool:
        """Whether its weight is not always the same; it is logged then."""
        return "schedule" in type(self).model_fields

    @property
    def scale(self) -> float | None:
        """The standard deviation of the prior, of the term that sets it."""
        return None

    @property
    def fewest(self) -> int:
        """Sequences that a micro step must have, over all ranks."""
        return 1

    @property
    def packages(self) -> dict[str, str]:
        """What its settings need beside a CUDA device: a package by key."""
        return {}

    def tiling(self, latent_size: int) -> Tiling | None:
        """Its ways to be computed, if several: training times all, and a run keeps the fastest."""
        return None

    def check(self, *, bound: float | None) -> None:
        """Refuse what cannot be learned, where it has weight.

        Args:
            bound: of the size of a code's coordinates; None where there is none.

        Raises:
            ValueError: in one line.
        """

    def weight_at(self, step: int, steps: int) -> float:
        """The weight at a step, counted from 0, of a run of `steps`."""
        return self.weight

    @abstractmethod
    def values(self, codes: Codes) -> tuple["Tensor", ...]:
        """What `logs` names: scalars, float32 or more.

        All ranks call it together. It asks an accelerator nothing, since the host would wait for
        the answer. Where codes are not finite, neither is what it comes to.
        """

    @abstractmethod
    def cost(self, rows: int, every: int, latent_size: int, *, accelerated: bool) -> Cost:
        """What it costs a rank in a micro step.

        Args:
            rows: b.
            every: N.
            latent_size: D.
            accelerated: on an accelerator.
        """


def rising(step: int, steps: int, share: float) -> float:
    """From 0 to 1 over the first share of some steps, then 1."""
    return min(1.0, step / max(1, round(share * steps)))
