"""The weight of the regulariser over the steps of a run."""

import math

from t5vae.config import MMD


def mmd_weight(step: int, steps: int, settings: MMD) -> float:
    """The weight of MMD^2 at a step, counted from 0, of a run of `steps`.

    "constant" is `weight`; "linear" rises to it from 0 over the first `warmup` share of the steps;
    "sigmoid" is weight * sigmoid(slope * step - offset), the original T5-VAE's.
    """
    if settings.schedule == "linear":
        return settings.weight * min(1.0, step / max(1, round(settings.warmup * steps)))
    if settings.schedule == "sigmoid":
        x = settings.slope * step - settings.offset
        return settings.weight * (1 + math.tanh(x / 2)) / 2  # a sigmoid that cannot overflow
    return settings.weight
