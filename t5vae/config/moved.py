"""A run's own config.yaml: what it names is found where the run lies now, from any folder."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from t5vae.common.section import is_path
from t5vae.config.config import STARTED_IN, Config
from t5vae.config.reading import within


def find_again(tree: dict[str, Any], file: Path) -> dict[str, list[str]]:
    """Change the paths in a run's own config.yaml to where they are found; no other file's.

    The run's folder is the one that the file lies in. Another path is looked for where it lay from
    the run's folder, in the working folder that the run started in, and in this one. What lies
    where it would be looked for anyway stays as it is written.

    Returns:
        The paths that were not found, with the places where they were looked for.
    """
    run, missing = tree.get("run"), dict[str, list[str]]()
    if not isinstance(run, dict):
        return missing
    is_own, started = is_of_run(tree, file), run.pop(STARTED_IN, None)
    name, given = run.get("name"), run.get("output_dir")
    then, folder = started or os.getcwd(), os.path.abspath(file.parent)
    if not (is_own and isinstance(name, str) and isinstance(given, str) and isinstance(then, str)):
        return missing
    place = given or os.path.join("runs", name)
    if not _same(place, folder):
        run["output_dir"] = str(file.parent)

    def found(path: str) -> str:
        if not path or "://" in path or path.startswith(("~", "$")):
            return path
        was = os.path.normpath(os.path.join(then, path))
        from_run = os.path.relpath(was, os.path.join(then, place))
        if os.path.isabs(path) and from_run.startswith(".."):
            return path
        near = os.path.normpath(os.path.join(folder, from_run))
        places = list(dict.fromkeys((near, was, os.path.abspath(path))))
        for each in places:
            if os.path.exists(each):
                return path if _same(each, path) else each
        missing[path] = places
        return path

    change_paths(tree, found)
    return missing


def is_of_run(tree: dict[str, Any], file: Path) -> bool:
    """Whether a configuration is a run's own, in its folder."""
    run = tree.get("run")
    started = isinstance(run, dict) and run.get(STARTED_IN)
    return file.name == "config.yaml" and bool(started or (file.parent / "checkpoints").is_dir())


def change_paths(tree: dict[str, Any], change: Callable[[str], str]) -> None:
    """Change every path of a configuration but those of its section `run`."""
    for section in tree.keys() - {"run"}:
        tree[section] = _changed(tree[section], within(Config, section), change)


def _changed(value: Any, held: Any, change: Callable[[str], str]) -> Any:
    """What a key holds, with its paths changed."""
    if isinstance(value, str) and is_path(held):
        return change(value)
    if isinstance(value, dict) and held is not Any:
        return {key: _changed(each, within(held, key), change) for key, each in value.items()}
    if isinstance(value, list) and held is not Any:
        return [_changed(each, within(held, n), change) for n, each in enumerate(value)]
    return value


def _same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False
