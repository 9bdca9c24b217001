"""The configuration of a run: frozen, checked as a whole, one YAML file with dotted overrides.

Imports nothing heavy: a launcher on a login node reads configurations too.
"""

from t5vae.config.config import Config, add_term
from t5vae.config.handed import as_option, names_function, refuse_choices
from t5vae.config.launching import Launcher
from t5vae.config.learning import T5, Model, Objective, Optim
from t5vae.config.loading import keys, load_config, presets, read_run
from t5vae.config.reading import read_values
from t5vae.config.running import (
    BatchSplit,
    Checkpoint,
    Data,
    DeepSpeed,
    Eval,
    Log,
    Run,
    Source,
    Train,
)

__all__ = [
    "T5",
    "BatchSplit",
    "Checkpoint",
    "Config",
    "Data",
    "DeepSpeed",
    "Eval",
    "Launcher",
    "Log",
    "Model",
    "Objective",
    "Optim",
    "Run",
    "Source",
    "Train",
    "add_term",
    "as_option",
    "keys",
    "load_config",
    "names_function",
    "presets",
    "read_run",
    "read_values",
    "refuse_choices",
]
