"""What is asked of every optimiser."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from t5vae.config import Optim

if TYPE_CHECKING:
    import torch

Group = dict[str, Any]
"""Of torch: "params", "weight_decay", what `Optimiser.settings` or AdamW's say, "full_lr" beside
"lr", and "own", whether the optimiser takes these weights for itself."""


@dataclass(frozen=True)
class Place:
    """Where weights are updated.

    Attributes:
        ranks: that share the work.
        on_cpu: whether they compute on CPUs.
        offloaded: whether accelerators leave the update to the host.
    """

    ranks: int
    on_cpu: bool
    offloaded: bool


@dataclass(frozen=True)
class Optimiser(ABC):
    """Updates the weights that it takes for itself; AdamW updates the rest.

    Bytes are those of a weight that it takes, before ZeRO deals them to ranks from stage 1 on.

    Attributes:
        optim: the run's.
    """

    optim: Optim

    knows_gradient_norm: ClassVar[bool] = True
    """Whether the norm that DeepSpeed finds, and would clip by, is the gradient's."""
    gathers: ClassVar[int] = 0
    """How often a step at ZeRO stage 3 gathers the weights that it takes. Above 0 it needs whole
    gradients, which are then reduced for all ranks, not scattered."""
    precision_key: ClassVar[str | None] = None
    """The key of `optim` for the precision of its products of matrices on a CPU, which are timed
    at the start of a run where that is null."""

    @staticmethod
    def takes(*, embedding: bool, dimensions: int) -> bool:
        """Whether it takes a weight for itself.

        Args:
            embedding: whether that is of an embedding, or tied to one.
            dimensions: 1 of a norm or bias, 2 of a matrix.
        """
        return True

    @staticmethod
    def moment_bytes(stage: int, gradient_bytes: int) -> int:
        """Of the moments between two steps; by default one in fp32.

        Args:
            stage: of ZeRO.
            gradient_bytes: of a gradient as ZeRO hands it over, 2 or 4: at stage 3 as ranks
                communicate it, else as the forward pass has its weight.
        """
        return 4

    @staticmethod
    def extra_bytes(stage: int, weight_bytes: int) -> dict[str, int]:
        """Of what it holds beside its moments from the backward pass to the update, by part.

        Args:
            stage: of ZeRO.
            weight_bytes: of a weight in the precision of the forward pass, 2 or 4.
        """
        return {}

    @staticmethod
    def operations(rows: int, columns: int) -> int:
        """Of the products of matrices that it makes in a step of one that it takes."""
        return 0

    def settings(self) -> dict[str, Any]:
        """Of a group of the weights that it takes, "lr" included."""
        return {"lr": self.optim.lr}

    @abstractmethod
    def build(self, groups: list[Group], place: Place) -> "torch.optim.Optimizer":
        """The optimizer that DeepSpeed wraps, for all groups.

        Raises:
            UserError: where it cannot work in this place.
        """
