"""Checkpoints on disk: which there are, whether they are whole, which are kept.

A checkpoint is a folder `step-00001000` with a file of each rank (`t5vae.training.fragments`) and a
manifest of their sizes and hashes. A folder without a manifest that verifies is no checkpoint.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from shards.errors import UserError
from t5vae.training.fragments import WEIGHT, Fragments

MANIFEST = "manifest.json"
FORMAT = 2


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


def verify(checkpoint: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None: every file's size and sha256 are compared.

    Args:
        hashes: compare sizes alone if false.
    """
    try:
        files = read_manifest(checkpoint)["files"]
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        problems = threads.map(lambda name: _problem(checkpoint / name, files[name], hashes), files)
        return next((problem for problem in problems if problem), None)


def _problem(path: Path, wanted: dict[str, Any], hashes: bool) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != wanted["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes, not {wanted['bytes']}"
    if not hashes:
        return None
    with open(path, "rb") as file:
        changed = hashlib.file_digest(file, "sha256").hexdigest() != wanted["sha256"]
    return f"{path.name} has changed" if changed else None


def seal(manifest: dict[str, Any]) -> bytes:
    """A manifest's file: itself, and its own hash."""
    return json.dumps({**manifest, "seal": _hash(manifest)}, indent=1).encode()


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's manifest.

    Raises:
        OSError, ValueError: where there is none, or not as it was written.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    if not isinstance(manifest, dict) or manifest.pop("seal", None) != _hash(manifest):
        raise ValueError("it has changed")
    return manifest


def _hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def digest(checkpoint: Path) -> str:
    """A fingerprint of a checkpoint's content."""
    return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()


def check_identity(manifest: dict[str, Any], identity: dict[str, Any]) -> None:
    """Refuse to resume a run as another one.

    Raises:
        UserError: naming the first thing that differs, with both values.
    """
    for name, value in identity.items():
        for where, saved, now in _differences(name.replace("_", " "), manifest.get(name), value):
            raise UserError(
                f"cannot resume: the checkpoint of step {manifest['step']} was saved with "
                f"{where} {_brief(saved)}, this run has {_brief(now)}; "
                "restore it, or choose another run.output_dir"
            )


def _differences(name: str, saved: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in now | saved:
            yield from _differences(f"{name}.{key}", saved.get(key), now.get(key))
    elif saved != now:
        yield name, saved, now


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def open_fragments(checkpoint: Path) -> Fragments:
    """What all ranks saved."""
    return Fragments([checkpoint / name for name in read_manifest(checkpoint)["files"]])


def consolidated_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's fp32 weights by parameter, flattened, on the CPU."""
    saved = open_fragments(checkpoint)
    names = [name for kind, name in saved.ranges if kind == WEIGHT]
    return {name: saved.read(WEIGHT, name, 0, saved.length(WEIGHT, name)) for name in names}


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
