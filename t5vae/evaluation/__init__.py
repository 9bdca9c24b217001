"""How good a space is: metrics, controls, one report."""

from t5vae.evaluation.evaluate import evaluate, table
from t5vae.evaluation.run import evaluate_run

__all__ = ["evaluate", "evaluate_run", "table"]
