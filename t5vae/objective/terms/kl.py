"""The Kullback-Leibler divergence of each code's posterior from the prior, as in a VAE.

With `model.posterior` gaussian a code is drawn from N(mean, diag(variance)) of its sequence (Kingma
and Welling, arXiv 1312.6114), and reconstruction + KL is minus the evidence lower bound (appendix B
there for N(0, I)). At weight 1 it is that bound exactly, per token or summed as reconstruction is.
"""

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from t5vae.common.section import Fraction
from t5vae.objective.term import Codes, Cost, Need, Term, rising

if TYPE_CHECKING:
    from torch import Tensor


class KL(Term):
    needs: ClassVar[frozenset[Need]] = frozenset({"posterior"})
    per_sequence: ClassVar[bool] = True
    shown: ClassVar[str | None] = "kl {:.2f}"

    weight: float = Field(default=0.0, ge=0)
    """Of the KL divergence in nats, weighed as the nats of reconstruction are: 1 is the evidence
    lower bound, others a beta-VAE; 0 for none."""
    free_bits: float = Field(default=0.0, ge=0)
    """Nats a coordinate of each sequence that cost nothing: less is counted as so much."""
    schedule: Literal["constant", "linear", "cyclical"] = "constant"
    """weight(step): constant; linear, from 0 over `warmup`; cyclical, the same in each of `cycles`
    equal parts of the run."""
    warmup: Fraction = 0.5
    """Share of the steps, or of those of a cycle, over which the weight rises."""
    cycles: int = Field(default=4, ge=1)
    """Of "cyclical"."""

    @property
    def logs(self) -> tuple[str, ...]:
        return ("kl_floored", "kl") if self.free_bits else ("kl",)

    def weight_at(self, step: int, steps: int) -> float:
        """Cyclical: Fu et al., arXiv 1903.10145, eq. 6 and 7, with R = `warmup`, M = `cycles`."""
        if self.schedule == "constant":
            return self.weight
        if self.schedule == "cyclical":
            steps = math.ceil(steps / self.cycles)
            step %= steps
        return self.weight * rising(step, steps, self.warmup)

    def values(self, codes: Codes) -> tuple["Tensor", ...]:
        """The sum over rows and coordinates; floored, each of these is at least `free_bits` (Li et
        al., arXiv 1909.00868, section 3.2, after Kingma et al., arXiv 1606.04934)."""
        mean_BD, log_variance_BD = codes.mean_BD, codes.log_variance_BD
        assert mean_BD is not None
        assert log_variance_BD is not None
        log_ratio_BD = log_variance_BD - 2 * math.log(codes.scale)
        square_BD = (mean_BD / codes.scale).square()
        kl_BD = 0.5 * (square_BD + log_ratio_BD.expm1() - log_ratio_BD)
        # Not by a dot product, whose last bit depends on where in memory the weights lie.
        kl = (kl_BD.sum(1) * codes.weights_B).sum()
        if not self.free_bits:
            return (kl,)
        floored = (kl_BD.clamp_min(self.free_bits).sum(1) * codes.weights_B).sum()
        return floored, kl

    def cost(self, rows: int, every: int, latent_size: int, *, accelerated: bool) -> Cost:
        return Cost(16 * rows * latent_size, 5 * 4 * rows * latent_size, 0)
