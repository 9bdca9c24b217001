"""What is minimised: reconstruction + weight(step) * MMD^2."""

from t5vae.objective.epps_pulley import sliced_epps_pulley
from t5vae.objective.mmd import PendingMMD, mmd, start_gather
from t5vae.objective.schedules import mmd_weight

__all__ = ["PendingMMD", "mmd", "mmd_weight", "sliced_epps_pulley", "start_gather"]
