"""Loading a configuration: a YAML file, dotted overrides, and errors in one line."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from t5vae.common.errors import UserError, printable
from t5vae.common.paths import expanded
from t5vae.config.config import Config
from t5vae.config.handed import chosen, refuse_variables
from t5vae.config.moved import find_again, is_of_run
from t5vae.config.reading import read, read_value

PRESETS = Path(__file__).parent / "presets"
REPLACED = {"train.steps": "train.minutes"}
"""Keys whose override unsets another, which would come before them."""


def presets() -> dict[str, Path]:
    """The configurations that come with t5vae, by name."""
    return {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}


def load_config(
    path: str | Path,
    overrides: list[str] | tuple[str, ...] = (),
    settings: Mapping[str, Any] | None = None,
    *,
    of_run: bool = False,
) -> Config:
    """Read a YAML file and apply `dotted.key=value` overrides, of which a later one wins.

    A run's own config.yaml, in its folder, is the run's that lies there now: see `find_again`. What
    it chooses that only its user may is known to `refuse_choices`.

    Args:
        path: of the file; or the bare name of a preset, such as quickstart. In text `~` and
            variables are expanded.
        overrides: as they are typed: see `read_value`.
        settings: values by dotted key, which are taken as they are; they win.
        of_run: the file is a run's own, whatever it looks like.

    Raises:
        UserError: for a missing or malformed file, a key that is given twice, an unknown key (the
            nearest valid one is suggested), a value out of range, or values that do not fit
            together.
    """
    given = Path(expanded(path)) if isinstance(path, str) else path
    path = presets().get(str(path)) or given
    tree = _tree(path)
    of_run = of_run or is_of_run(tree, path)
    if of_run:
        refuse_variables(tree, path)
    missing = find_again(tree, path)
    typed = [*(settings or {})]
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override!r} is not an override; write section.key=value")
        _put(tree, key, read_value(value, key))
        typed.append(key)
    for key, value in (settings or {}).items():
        _put(tree, key, value)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None
    config.data._looked_for = tuple(
        place for shards in config.data.paths for place in missing.get(shards, ())
    )
    if of_run:
        its = chosen(config)
        config._of_run = {key: its[key] for key in its if not _is_typed(key, typed)}
    if config.run.name:
        return config
    run = config.run.model_copy(update={"name": path.stem})
    return config.model_copy(update={"run": run})


def read_run(run: Path, settings: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a run that is looked at: it is that of this folder, and its shards are
    kept in the cache of whoever looks.

    Args:
        run: its folder.
        settings: values by dotted key, in place of its own.

    Raises:
        UserError: as `load_config`.
    """
    here = {"run.output_dir": str(run), "data.cache_dir": None}
    return load_config(run / "config.yaml", settings={**here, **(settings or {})}, of_run=True)


def _is_typed(key: str, typed: list[str]) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in typed)


def _tree(path: Path) -> dict[Any, Any]:
    try:
        tree = read(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"no configuration at {path}; those that come with t5vae are {', '.join(presets())}"
        ) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = printable(" ".join(str(error).split()))
        raise UserError(f"{path} is not a readable YAML file: {reason}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no configuration; it must be a mapping of sections")
    return tree


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    if key in REPLACED:
        _put(tree, REPLACED[key], None)
    *path, leaf = key.split(".")
    for section in path:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UserError(f"{key!r}: {section!r} is a value, not a section")
    tree[leaf] = value


def keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every valid dotted key."""
    found = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += keys(inner, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def _explain(error: ValidationError) -> str:
    """All that is wrong, in one line."""
    lines = []
    for problem in error.errors():
        message = problem["msg"].removeprefix("Value error, ")
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            every = keys()
            parents = sorted({key.rpartition(".")[0] for key in every} - {""})
            leaf = where.rpartition(".")[2]
            near = [key for key in every if key.rpartition(".")[2] == leaf]
            near = near or difflib.get_close_matches(where, every + parents, n=1, cutoff=0.6)
            near = near or [key for key in every if leaf in key]
            hint = f"; did you mean {near[0]}?" if near else ""
            lines.append(f"unknown key {where}{hint}")
        elif problem["type"] == "missing":
            lines.append(f"{where} is missing")
        elif where:
            lines.append(f"{where} is {problem['input']!r}: {message}")
        else:
            lines.append(message)
    return printable(" ".join("; ".join(lines).split()))
