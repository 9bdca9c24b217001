"""Training: `train` is what one process of a run does, from signals to exit code."""

from t5vae.cluster.errors import UnhealthyError
from t5vae.training.main import exit_code_of, train

__all__ = ["UnhealthyError", "exit_code_of", "train"]
