"""Training: `train` is what one process of a run does, from signals to exit code."""

from t5vae.training.main import train

__all__ = ["train"]
