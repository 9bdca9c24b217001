"""What a run's own config.yaml may not choose, for a run's folder can come from anybody.

What names code, or a folder to write into, counts from the command line and from one's own
configuration alone.
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from t5vae.common.errors import UserError
from t5vae.config.config import Config
from t5vae.config.moved import change_paths

CHOICES = {
    "data.cache_dir": "a folder that old files are deleted from",
    "deepspeed.config": "settings of DeepSpeed, some of which name modules and files",
    "eval.check": "a function",
    "eval.measure": "a function",
    "launcher.python": "a command",
    "launcher.setup": "lines of shell",
    "launcher.slurm": "options of the scheduler",
    "launcher.srun_args": "options of srun",
}
"""Keys that are not a run's to choose, and what they name; of a checker or measure, a dotted path
alone."""


def names_function(checker_or_measure: str | None) -> bool:
    """Whether it is a dotted path, and none of the names and patterns that come with t5vae."""
    name = checker_or_measure or ""
    return not name.startswith("regex:") and ("." in name or ":" in name)


def chosen(config: Config) -> dict[str, Any]:
    """What a configuration chooses of `CHOICES`, by key."""
    found = {}
    for key in CHOICES:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if names_function(value) if section == "eval" else value:
            found[key] = value
    return found


def refuse_variables(tree: dict[str, Any], file: Path) -> None:
    """Refuse a run's config.yaml that would put a variable of the environment into a path.

    Raises:
        UserError: for the first of them.
    """

    def refuse(path: str) -> str:
        if "$" in path:
            raise UserError(
                f"{file} has a variable in the path {path!r}: a run's own has none, so write what "
                "it stands for"
            )
        return path

    change_paths(tree, refuse)


def as_override(key: str, value: Any) -> str:
    """A setting as it is typed in a shell."""
    return shlex.quote(f"{key}={value if isinstance(value, str) else json.dumps(value)}")


def as_option(key: str, value: Any) -> str:
    """The same as the option of a command."""
    return f"--{key.partition('.')[2]} {shlex.quote(str(value))}"


def refuse_choices(
    config: Config, *sections: str, typed: Callable[[str, Any], str] = as_override
) -> None:
    """Refuse what is a run's choice, and not its user's, and would be used now.

    Args:
        config: of a run, or one's own, of which nothing is refused.
        sections: that are used.
        typed: how a user chooses the same.

    Raises:
        UserError: for the first of it.
    """
    for key, value in config._of_run.items():
        if key.partition(".")[0] in sections:
            raise UserError(
                f"{config.run_dir}/config.yaml chooses {CHOICES[key]} for {key}, which no run's "
                f"folder may, for it can come from anybody: if you trust it, add "
                f"{typed(key, value)}"
            )
