"""Lion (Chen et al., arXiv 2302.06675), of which DeepSpeed has kernels."""

from typing import TYPE_CHECKING, Any

from t5vae.common.errors import UserError
from t5vae.training.optimisers.base import Group, Optimiser, Place

if TYPE_CHECKING:
    import torch


class Lion(Optimiser):
    """Takes all weights."""

    def settings(self) -> dict[str, Any]:
        return {"lr": self.optim.lr, "betas": self.optim.betas}

    def build(self, groups: list[Group], place: Place) -> "torch.optim.Optimizer":
        """Raises:
        UserError: without a CUDA device or offloading, for which DeepSpeed has none.
        """
        import torch
        from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

        if not place.offloaded and not torch.cuda.is_available():
            raise UserError(
                "optim.name lion needs a CUDA device, or deepspeed.offload_optimizer for the "
                "host's; use adamw or muon"
            )
        return (DeepSpeedCPULion if place.offloaded else FusedLion)(groups)
