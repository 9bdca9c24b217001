"""Optimisers: what the engine, the plan and the configuration ask of one; each has a file here.

None of these files loads torch when it is imported, since a login node checks configurations.
"""

from t5vae.training.optimisers.base import Group, Optimiser, Place

__all__ = ["Group", "Optimiser", "Place"]
