"""Steps that go wrong: counted, told, and too many in a row stop the run."""

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

from t5vae.cluster.errors import SharedError

SETTLED = 20  # steps until a running mean is trusted
DECAY = 0.98
WATCHED = ("nats_per_token", "grad_norm")


@dataclass
class Anomalies:
    """Looks at every step, on all ranks with the same figures.

    A step is bad if it was skipped, since a loss or a gradient was not finite, or if the
    cross-entropy or the gradient's norm is a spike: `spike` times its running mean. What goes into
    the mean is cut off there, so a lasting rise soon is the new level, unless it is steep.

    Attributes:
        limit: bad steps in a row at which the run stops; 0 for none.
        spike: 0 for no spikes.
        skipped: steps that left the weights as they were.
        nonfinite: steps with a loss that was not finite.
        spikes: steps with a spike.
    """

    limit: int
    spike: float
    skipped: int = 0
    nonfinite: int = 0
    spikes: int = 0
    in_a_row: int = 0
    means: dict[str, float] = field(default_factory=dict)
    seen: int = 0

    def look(
        self, figures: dict[str, float], applied: bool, nonfinite_ranks: Collection[int]
    ) -> str | None:
        """Count a step; what is to be told of it.

        Args:
            figures: of the step: the cross-entropy and, where it is known, the gradient's norm.
            applied: whether the weights were updated.
            nonfinite_ranks: whose loss was not finite.
        """
        figures = {name: figures[name] for name in WATCHED if name in figures}
        problem = None
        if nonfinite_ranks:
            self.nonfinite += 1
            ranks = ", ".join(map(str, sorted(nonfinite_ranks)))
            problem = f"the loss of rank {ranks} is not finite: skipped"
        elif not applied:
            problem = "the gradient is not finite: skipped"
        else:
            high = [name for name, value in figures.items() if self._is_spike(name, value)]
            if high:
                self.spikes += 1
                problem = ", ".join(
                    f"{name} {figures[name]:.4g} is a spike (usually {self.means[name]:.4g})"
                    for name in high
                )
            self._remember(figures)
        self.skipped += not applied
        self.in_a_row = self.in_a_row + 1 if problem else 0
        return problem

    def stop_if_over(self, event: str, replay: str) -> None:
        """End the run where too many steps in a row went wrong.

        Args:
            event: what was told of the last step.
            replay: the command that shows its batch.

        Raises:
            SharedError: that it is over.
        """
        if 0 < self.limit <= self.in_a_row:
            raise SharedError(
                f"{self.in_a_row} steps in a row went wrong; {event}; the checkpoints before them "
                f"are untouched: look at the batch ({replay}), lower optim.lr, or use another "
                "train.precision"
            )

    @property
    def counts(self) -> dict[str, int]:
        return {"skipped": self.skipped, "nonfinite": self.nonfinite, "spikes": self.spikes}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to count on."""
        state = asdict(self)
        del state["limit"], state["spike"]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def _is_spike(self, name: str, value: float) -> bool:
        usual = self.means.get(name, math.inf)
        return self.spike > 0 and self.seen >= SETTLED and value > self.spike * usual

    def _remember(self, figures: dict[str, float]) -> None:
        share = max(1 - DECAY, 1 / (self.seen + 1))
        for name, value in figures.items():
            mean = self.means.get(name, value)
            most = self.spike * mean if self.spike and self.seen >= SETTLED else value
            self.means[name] = mean + share * (min(value, most) - mean)
        self.seen += 1
