"""Checkpoints of a run: which there are, which are kept, which are set aside."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from t5vae.checkpoint.manifest import FORMAT, MANIFEST, read_manifest, verify
from t5vae.common.errors import UserError


def newest_valid(
    folder: Path, report: Callable[[str], None] | None = None, *, step: int | None = None
) -> Path | None:
    """The newest checkpoint whose manifest verifies; damaged ones are set aside and reported.

    Args:
        folder: `checkpoints/` of a run.
        report: told of each that is damaged.
        step: look at that step's alone.
    """
    for candidate in reversed(list_checkpoints(folder)):
        if step is not None and step_of(candidate) != step:
            continue
        problem = verify(candidate)
        if problem is None:
            return candidate
        aside = set_aside(candidate)
        if report:
            report(f"{candidate.name} is damaged ({problem}); set aside as {aside.name}")
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, whole or not."""
    found = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def newest_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the newest checkpoint, its files unverified; None if there is none."""
    for candidate in reversed(list_checkpoints(folder)):
        try:
            return read_manifest(candidate)
        except (OSError, ValueError):
            continue
    return None


def describe(folder: Path, *, hashes: bool) -> list[dict[str, Any]]:
    """What there is in `checkpoints/`, oldest first: checkpoints, and what was set aside.

    Args:
        hashes: verify all of each file, not its size alone.

    Returns:
        name, bytes, problem (None for a whole one), and of whole ones step, saved_at (seconds since
        1970), world_size, zero_stage, precision, held_out (nats a token, or None).
    """
    found = []
    for path in [*list_checkpoints(folder), *sorted(folder.glob("step-*.*"))]:
        size = sum(file.stat().st_size for file in path.iterdir())
        found.append({"name": path.name, "bytes": size, **_describe(path, hashes)})
    return found


def _describe(path: Path, hashes: bool) -> dict[str, Any]:
    if path.suffix:
        return {"problem": "unfinished" if path.suffix == ".tmp" else "set aside"}
    problem = verify(path, hashes=hashes)
    if problem:
        return {"problem": problem}
    manifest = read_manifest(path)
    if manifest.get("format") != FORMAT:
        return {"problem": "saved by another version"}
    layout = {name: manifest["layout"][name] for name in ("world_size", "zero_stage", "precision")}
    return {
        "problem": None,
        "step": manifest["step"],
        "saved_at": (path / MANIFEST).stat().st_mtime,
        **layout,
        "held_out": manifest["held_out"],
    }


def remove(folder: Path, name: str) -> Path:
    """Delete one checkpoint, by its step or its folder's name.

    Raises:
        UserError: if it is not there, or the run would go on from it.
    """
    target = folder / (f"step-{int(name):08d}" if name.isdigit() else name)
    there = sorted(folder.glob("step-*"))
    if target not in there:
        names = ", ".join(path.name for path in there) or "none"
        raise UserError(f"there is no checkpoint {name} in {folder}; there are: {names}")
    whole = [path for path in list_checkpoints(folder) if verify(path) is None]
    if whole and target == whole[-1]:
        raise UserError(
            f"{target.name} is the newest whole checkpoint, from which the run would go on; to "
            f"delete all of the run, delete {folder.parent}"
        )
    delete(target)
    return target


def retain(folder: Path, *, last: int, every: int = 0, best: bool = False) -> None:
    """Delete all but the newest `last`, each `every`-th step's, and the best on held-out data."""
    found = list_checkpoints(folder)
    keep = set(found[-last:])
    keep |= {path for path in found if every and step_of(path) % every == 0}
    if best:
        losses = {path: read_manifest(path)["held_out"] for path in found if _readable(path)}
        measured = {path: loss for path, loss in losses.items() if loss is not None}
        keep |= {min(measured, key=measured.__getitem__)} if measured else set()
    for old in found:
        if old not in keep:
            delete(old)


def _readable(checkpoint: Path) -> bool:
    try:
        read_manifest(checkpoint)
    except (OSError, ValueError):
        return False
    return True


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that none is ever half there."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.deleted")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Delete what a crash left of saving and deleting; only while nobody else saves here."""
    for left in [*folder.glob("step-*.tmp"), *folder.glob("step-*.deleted")]:
        shutil.rmtree(left)


def set_aside(path: Path) -> Path:
    """Rename a folder out of the way."""
    number = 0
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return path.rename(aside)
