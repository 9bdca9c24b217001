"""The sliced Epps-Pulley statistic, see `t5vae.objective.epps_pulley`: it sees the axes and tails
that MMD does not."""

from typing import TYPE_CHECKING

from pydantic import Field

from t5vae.objective.term import Codes, Cost, Term

if TYPE_CHECKING:
    from torch import Tensor

KNOTS = 16


class EppsPulley(Term):
    weight: float = Field(default=0.0, ge=0)
    """Of the sliced Epps-Pulley statistic in the loss; 0 for none."""
    slices: int = Field(default=256, ge=0)
    """Random directions, new ones in every step."""
    axes: bool = True
    """The coordinate axes too."""

    @property
    def logs(self) -> tuple[str, ...]:
        return ("epps_pulley",)

    def check(self, *, bound: float | None) -> None:
        if not (self.slices or self.axes):
            raise ValueError("objective.epps_pulley needs directions: set slices, axes or both")

    def values(self, codes: Codes) -> tuple["Tensor", ...]:
        from t5vae.objective import sliced_epps_pulley

        statistic = sliced_epps_pulley(
            codes.z_BD,
            slices=self.slices,
            axes=self.axes,
            sigma=codes.scale,
            weights_B=codes.weights_B,
            count=codes.count,
            generator_seed=codes.seed,
        )
        return (statistic,)

    def cost(self, rows: int, every: int, latent_size: int, *, accelerated: bool) -> Cost:
        """Projections, twice, and back, and two complex multiply-adds a projection and knot; all
        sums and their slopes in complex128, and chunks of projections in complex64."""
        directions = self.slices + latent_size * self.axes
        products = 6 * rows * latent_size * self.slices
        powers = 16 * rows * directions * KNOTS
        chunk = min(rows * directions, 2**22 if accelerated else 2**18)
        sums = 16 * KNOTS * directions
        held = 4 * latent_size * (2 * rows + self.slices) + 3 * 8 * chunk + 4 * sums
        return Cost(products + powers, held, 2 * sums)
