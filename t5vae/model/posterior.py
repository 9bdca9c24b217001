"""What a code is drawn from: a normal distribution whose parameters the bottleneck gives.

Shapes: B sequences, D latent size.
"""

from typing import NamedTuple, Self

from torch import Tensor

from t5vae.model.noise import POSTERIOR, keyed_normal


class Posterior(NamedTuple):
    """N(mean, diag(exp(log_variance))) (Kingma and Welling, arXiv 1312.6114), float32 [B, D] each.

    Log-variances lie between -30 and 20, so that none overflows.
    """

    mean_BD: Tensor
    log_variance_BD: Tensor

    @classmethod
    def of(cls, encoded_BE: Tensor) -> Self:
        """From what the bottleneck made, [B, 2 D]."""
        mean_BD, log_variance_BD = encoded_BE.float().chunk(2, dim=1)
        return cls(mean_BD, log_variance_BD.clamp(-30, 20))

    def draw(self, keys_B: Tensor) -> Tensor:
        """A code of each row by its key: reparameterised, with the gradient of both parameters."""
        noise_BD = keyed_normal(keys_B, self.mean_BD.shape[1], POSTERIOR)
        return self.mean_BD + (self.log_variance_BD / 2).exp() * noise_BD
