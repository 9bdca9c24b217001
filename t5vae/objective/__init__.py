"""What is minimised: reconstruction + sum over terms of weight(step) * term.

`t5vae.objective.terms` has the terms, a file each; the table `TERMS` of `t5vae.common.kinds` names
them. They are sections of the configuration too, so nothing here loads torch before it is wanted.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from t5vae.objective.term import Codes, Cost, Term

if TYPE_CHECKING:
    from t5vae.objective.discrepancy import mmd, mmd_of
    from t5vae.objective.epps_pulley import sliced_epps_pulley
    from t5vae.objective.gathering import Gathering, rows_that_count, start_gather

__all__ = [
    "Codes",
    "Cost",
    "Gathering",
    "Term",
    "mmd",
    "mmd_of",
    "rows_that_count",
    "sliced_epps_pulley",
    "start_gather",
]
HOMES = {
    "Gathering": "gathering",
    "mmd": "discrepancy",
    "mmd_of": "discrepancy",
    "rows_that_count": "gathering",
    "sliced_epps_pulley": "epps_pulley",
    "start_gather": "gathering",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
