"""The output layer: states -> logits, or straight to the cross-entropy of labels.

Shapes: N tokens, C model width, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel


class Head(nn.Linear):
    """T5's output layer, which can also score labels.

    Scoring lies inside `forward`, since ZeRO-3 gathers a weight for the calls of its module alone.

    Args:
        linear: the layer whose weight [V, C] it takes over.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight

    def forward(
        self, states: Tensor, labels_N: Tensor | None = None, fused: bool = False
    ) -> Tensor:
        """The logits of states, or the cross-entropy of labels.

        Args:
            states: [..., C]; with labels [N, C].
            labels_N: int64 [N].
            fused: let liger-kernel sum the cross-entropies without ever storing all logits.

        Returns:
            Logits [..., V]; with labels their cross-entropies in nats, float32 [N]; fused, the sum.
        """
        if labels_N is None:
            return super().forward(states)
        if fused and len(labels_N):  # liger divides by their number
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            return liger_fused_linear_cross_entropy(
                states, self.weight, labels_N, reduction="sum", accum_dtype=torch.float32
            )
        nll_N = cross_entropy(super().forward(states).float(), labels_N, reduction="none")
        return nll_N.sum() if fused else nll_N


def untie(t5: PreTrainedModel) -> None:
    """Give the output layer of a T5 weights of its own, and keep the rest tied.

    transformers forces T5's `tie_word_embeddings` to be true and ties again whenever it resizes,
    although T5 v1.1, Flan-T5, ByT5, mT5 and UMT5 have two different matrices.
    """
    if t5.lm_head.weight is t5.shared.weight:
        t5.lm_head.weight = nn.Parameter(t5.shared.weight.detach().clone())
    t5._tied_weights_keys = {
        tied: source for tied, source in t5._tied_weights_keys.items() if tied != "lm_head.weight"
    }
    t5.all_tied_weights_keys = dict(t5._tied_weights_keys)
