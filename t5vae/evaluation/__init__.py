"""How good a trained space is: metrics with controls beside them."""

from t5vae.evaluation.evaluate import evaluate, table

__all__ = ["evaluate", "table"]
