"""Paths as people write them."""

import os
import re
from pathlib import Path
from typing import Any

from t5vae.common.errors import UserError

VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^{}]*)\})", re.ASCII)


def expanded(path: str) -> str:
    """A path, or a URL, with `$NAME` and `${NAME}` from the environment and `~` for the home.

    Raises:
        UserError: a variable is not set, or is empty, or the home is not known.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if not os.environ.get(name):
            raise UserError(f"{path!r} needs the variable {name!r}, which is not set: set it")
        return os.environ[name]

    whole = os.path.expanduser(VARIABLE.sub(value, path))
    if whole == "~" or whole.startswith("~/"):
        raise UserError(f"{path!r} needs your home folder, which is not known: set HOME")
    return whole


def expand(paths: Any) -> Any:
    """The same in what an option or argument says of paths: one, several, or none."""
    if isinstance(paths, list | tuple):
        return [expand(each) for each in paths]
    if isinstance(paths, Path):
        return Path(expanded(str(paths)))
    return None if paths is None else expanded(paths)
