"""The configuration of a run: frozen, checked as a whole, one YAML file with dotted overrides.

Imports nothing heavy: a launcher on a login node reads configurations too.
"""

from t5vae.config.loading import describe_keys, keys, load_config
from t5vae.config.sections import (
    MMD,
    T5,
    Checkpoint,
    Config,
    Data,
    DeepSpeed,
    EppsPulley,
    Eval,
    Launcher,
    Log,
    Model,
    Objective,
    Optim,
    Run,
    Source,
    Train,
)

__all__ = [
    "MMD",
    "T5",
    "Checkpoint",
    "Config",
    "Data",
    "DeepSpeed",
    "EppsPulley",
    "Eval",
    "Launcher",
    "Log",
    "Model",
    "Objective",
    "Optim",
    "Run",
    "Source",
    "Train",
    "describe_keys",
    "keys",
    "load_config",
]
