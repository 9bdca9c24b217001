"""The `t5vae` command. Heavy imports wait until a command needs them."""

from t5vae.cli.app import app, main

# isort: off
from t5vae.cli import training, running, watching, configs  # noqa: F401  in the help's order
from t5vae.cli import machine, codes, space, properties  # noqa: F401
# isort: on

__all__ = ["app", "main"]
