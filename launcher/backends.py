"""The kinds of places that jobs run in: a module each, and a line in this table."""

from launcher import local, slurm
from launcher.backend import Backend

BACKENDS: dict[str, Backend] = {"slurm": slurm, "local": local}
