"""AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

from typing import TYPE_CHECKING

from t5vae.training.optimisers.base import Group, Optimiser, Place

if TYPE_CHECKING:
    import torch


class AdamW(Optimiser):
    """All weights are the rest, which every optimiser leaves to AdamW."""

    @staticmethod
    def takes(*, embedding: bool, dimensions: int) -> bool:
        return False

    def build(self, groups: list[Group], place: Place) -> "torch.optim.Optimizer":
        import torch

        on_host = place.on_cpu or place.offloaded
        return torch.optim.AdamW(groups, fused=on_host or None)  # there in one pass, vectorised
