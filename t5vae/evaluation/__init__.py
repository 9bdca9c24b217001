"""How good a space is: metrics, controls, one report."""

from t5vae.evaluation.evaluate import evaluate
from t5vae.evaluation.report import read_report
from t5vae.evaluation.run import evaluate_run
from t5vae.evaluation.tables import comparison, differences, table
from t5vae.evaluation.training import GivenTraining, Training

__all__ = [
    "GivenTraining",
    "Training",
    "comparison",
    "differences",
    "evaluate",
    "evaluate_run",
    "read_report",
    "table",
]
