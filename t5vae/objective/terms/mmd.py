"""MMD^2 between the codes of the global batch and the prior, see `t5vae.objective.discrepancy`."""

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from t5vae.common.section import Fraction
from t5vae.objective.term import Codes, Cost, Need, Term, Tiling, rising

if TYPE_CHECKING:
    from torch import Tensor


class MMD(Term):
    needs: ClassVar[frozenset[Need]] = frozenset({"gathered"})
    shown: ClassVar[str | None] = "mmd {:.5f}"

    kernel: Literal["rbf", "multi_rbf", "imq", "legacy"] = "imq"
    """rbf; multi_rbf, a mean of five octaves of it; imq, inverse multiquadrics of seven scales;
    legacy, the original's rbf of bandwidth D^2."""
    prior: Literal["normal", "uniform", "sampled"] = "normal"
    """N(0, sigma^2 I) or uniform on (-sigma, sigma)^D, in closed form; or draws of the former."""
    estimator: Literal["u", "v"] = "u"
    """u is unbiased; v, the original's, counts each code against itself and shrinks codes."""
    sigma: float = Field(default=1.0, gt=0)
    """Standard deviation of the prior, half its width where that is uniform."""
    weight: float = Field(default=30.0, ge=0)
    """Of MMD^2 in the loss, against nats a token (or all nats, under reconstruction sum)."""
    schedule: Literal["constant", "linear", "sigmoid"] = "constant"
    """weight(step): constant; linear, from 0 over `warmup`; sigmoid(slope * step - offset)."""
    warmup: Fraction = 0.1
    """Share of the steps over which "linear" rises."""
    slope: float = 0.0025
    """Of the sigmoid, per step."""
    offset: float = 6.25
    """Of the sigmoid."""
    implementation: Literal["blocked", "triton"] = "blocked"
    """triton: fused, on CUDA devices alone."""

    @property
    def is_on(self) -> bool:
        """Always: without weight it tells how the codes lie."""
        return True

    @property
    def logs(self) -> tuple[str, ...]:
        return ("mmd",)

    @property
    def scale(self) -> float:
        return self.sigma

    @property
    def fewest(self) -> int:
        return 2 if self.estimator == "u" else 1

    @property
    def packages(self) -> dict[str, str]:
        return {"implementation": "triton"} if self.implementation == "triton" else {}

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `mmd`."""
        names = {"kernel", "prior", "estimator", "sigma", "implementation"}
        return {name: getattr(self, name) for name in names}

    def tiling(self, latent_size: int) -> Tiling | None:
        if self.implementation != "triton":
            return None
        from t5vae.objective import fused
        from t5vae.objective.kernels import make_kernel

        return fused.Tiling(make_kernel(self.kernel, latent_size, self.sigma), latent_size)

    def check(self, *, bound: float | None) -> None:
        fits = bound is None or bound > self.sigma
        if not (fits or self.prior == "uniform" or self.kernel == "legacy"):
            raise ValueError(
                f"model.squash bounds codes to (-{bound:g}, {bound:g}), which cannot match the "
                f"prior N(0, {self.sigma:g}^2 I): use no squash, model.squash_scale 3 or more, or "
                "objective.mmd.prior uniform (only kernel legacy allows both)"
            )

    def weight_at(self, step: int, steps: int) -> float:
        if self.schedule == "linear":
            return self.weight * rising(step, steps, self.warmup)
        if self.schedule == "sigmoid":
            x = self.slope * step - self.offset
            return self.weight * (1 + math.tanh(x / 2)) / 2  # a sigmoid that cannot overflow
        return self.weight

    def values(self, codes: Codes) -> tuple["Tensor", ...]:
        from t5vae.objective import mmd_of

        assert codes.gathering is not None
        return (mmd_of(codes.gathering, **self.options, generator_seed=codes.seed),)

    def cost(self, rows: int, every: int, latent_size: int, *, accelerated: bool) -> Cost:
        """Two products of b x D by D x N; the codes of all ranks, copies of them, and tiles.

        Of all: gathered; centred and with their norms, all of them or, where a rank has few, a
        tile's; of a rank's own: in fp32, centred, with their norms, and their gradient.
        """
        height, width = (4096, 8192) if accelerated else (1152, 2304)
        tiles = 3 * min(height, rows) * min(width, every)
        few = height >= rows < every and self.implementation == "blocked"
        copied = min(width, every) if few else every
        codes = (every + copied + 3 * rows) * latent_size + (copied + rows) * (latent_size + 2)
        return Cost(4 * rows * every * latent_size, 4 * (codes + tiles), 4 * every * latent_size)
