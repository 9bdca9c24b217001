"""Muon: momentum orthogonalised by Newton and Schulz's iteration (Jordan et al., 2024)."""

from typing import TYPE_CHECKING, Any

from t5vae.training.optimisers.base import Group, Optimiser, Place

if TYPE_CHECKING:
    import torch
    from torch import nn


class Muon(Optimiser):
    """Takes the matrices between embedding and logits; as DeepSpeed has it for every ZeRO stage.

    DeepSpeed finds the norm of the orthogonalised update. It keeps the momentum in the precision of
    the gradients that it is given: at stages 1 and 2 the weights', and the new one apart until a
    step is known to be one; at stage 3 that of communication.
    """

    knows_gradient_norm = False
    gathers = 4
    precision_key = "muon_precision"

    @staticmethod
    def takes(*, embedding: bool, dimensions: int) -> bool:
        return dimensions >= 2 and not embedding

    @staticmethod
    def moment_bytes(stage: int, gradient_bytes: int) -> int:
        return gradient_bytes if stage else 4

    @staticmethod
    def extra_bytes(stage: int, weight_bytes: int) -> dict[str, int]:
        return {"staged momentum": weight_bytes} if stage in (1, 2) else {}

    @staticmethod
    def operations(rows: int, columns: int) -> int:
        """Of five steps of the iteration, on the matrix or on its Gram matrix; see
        `t5vae.training.muon`."""
        m, n = sorted((rows, columns))
        return min(5 * (4 * m**2 * n + 2 * m**3), 4 * m**2 * n + 17 * 2 * m**3)

    def settings(self) -> dict[str, Any]:
        return {"lr": self.optim.muon_lr, "momentum": self.optim.momentum}

    def build(self, groups: list[Group], place: Place) -> "torch.optim.Optimizer":
        import torch
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

        from t5vae.training.muon import muon_on_cpu

        for group in groups:
            group["use_muon"] = group["own"]
            # The Gram variant needs fewer operations, but in fp16.
            group["ns_method"] = "standard" if place.on_cpu else "gram"
            for weight in group["params"]:
                weight.use_muon = group["own"]
        adam: dict[str, Any] = {}
        if place.on_cpu:
            muon_on_cpu(self.optim.muon_precision)
            adam = {"adam_optimizer": torch.optim.AdamW, "adam_optimizer_kwargs": {"fused": True}}
        optimizer = MuonWithAuxAdam(groups, **adam)
        for group in optimizer.param_groups:
            if group["own"]:
                group["params"] = _dealt(group["params"], place.ranks)
        return optimizer


def _dealt(matrices: list["nn.Parameter"], ranks: int) -> list["nn.Parameter"]:
    """The same matrices in an order of which DeepSpeed's equal partitions have equal work.

    Equal ones are dealt to the ranks in turn. A rank updates the whole of every matrix of which its
    partition has a part, so few should be cut.
    """

    def sizes(matrix: "nn.Parameter") -> list[int]:
        return sorted(getattr(matrix, "ds_shape", matrix.shape), reverse=True)

    largest_first = sorted(matrices, key=sizes, reverse=True)
    return [matrix for rank in range(ranks) for matrix in largest_first[rank::ranks]]
