"""Directions: what changes between the texts of pairs, to be applied to other texts.

Shapes: P pairs, N texts, D latent size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from t5vae.common.errors import UserError
from t5vae.latent.codec import Codec


@dataclass(frozen=True)
class Direction:
    """The mean difference between the codes of pairs' second and first texts.

    The vector arithmetic of attribute vectors (Larsen et al., arXiv 1512.09300).

    Attributes:
        codec: encodes and decodes.
        vector_D: the difference, float32 [D].
        consistency: mean cosine between each pair's difference and the mean of the others': 1
            where all pairs differ alike, about 0 where they have nothing in common; None of one
            pair.
    """

    codec: Codec
    vector_D: Tensor
    consistency: float | None

    def apply(self, texts: Sequence[str], strength: float = 1.0) -> list[str]:
        """Each text moved along the direction and decoded, greedily.

        Args:
            texts: N strings.
            strength: 1 goes as far as the pairs do, 0 reconstructs, -1 goes the other way.
        """
        z_ND = self.codec.encode(texts) + strength * self.vector_D
        return self.codec.detokenize(self.codec.decode_ids(z_ND))


def direction(codec: Codec, pairs: Sequence[tuple[str, str]]) -> Direction:
    """The direction from the first texts of pairs to the second.

    Raises:
        UserError: for no pairs, or a text that is too long.
    """
    if not pairs:
        raise UserError("a direction needs at least one pair of texts; none given")
    first, second = zip(*pairs, strict=True)
    steps_PD = codec.encode(second) - codec.encode(first)
    total_D = steps_PD.sum(0)
    consistency = None
    if len(pairs) > 1:
        cosines_P = torch.nn.functional.cosine_similarity(steps_PD, total_D - steps_PD)
        consistency = cosines_P.mean().item()
    return Direction(codec, total_D / len(pairs), consistency)
