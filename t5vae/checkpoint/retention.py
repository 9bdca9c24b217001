"""Checkpoints of a run: which there are, which are kept, which are set aside."""

import re
import shutil
from collections.abc import Callable, Generator, Iterable
from itertools import chain, count
from pathlib import Path
from typing import Any

from t5vae.checkpoint.files import ABSENT, free, move, names, reach
from t5vae.checkpoint.manifest import FORMAT, MANIFEST, parse, read_manifest, verify
from t5vae.common.errors import StorageError, UserError, first_line

Search = Generator[Path, str | None, Path | None]

UNFINISHED, DELETED, DAMAGED = ".tmp", ".deleted", ".damaged"


def newest_valid(
    folder: Path, report: Callable[[str], None] | None = None, *, step: int | None = None
) -> Path | None:
    """The newest checkpoint whose manifest verifies; damaged ones are set aside and reported.

    Args:
        folder: `checkpoints/` of a run.
        report: told of each that is damaged.
        step: look at that step's alone.

    Raises:
        StorageError: the storage failed for minutes, which makes no checkpoint a damaged one.
        UserError: a file may not be read, or a damaged one not be set aside.
    """
    finding = find_valid(folder, report, step=step)
    problem = None
    while True:
        try:
            problem = verify(finding.send(problem))
        except StopIteration as end:
            return end.value


def find_valid(
    folder: Path, report: Callable[[str], None] | None = None, *, step: int | None = None
) -> Search:
    """The same, for whoever compares hashes otherwise.

    Yields:
        A checkpoint whose sizes are right; what else is wrong with it is to be sent, or None.
    """
    for candidate in reversed(list_checkpoints(folder)):
        if step is not None and step_of(candidate) != step:
            continue
        problem = verify(candidate, hashes=False) or (yield candidate)
        if problem is None:
            return candidate
        try:
            aside = set_aside(candidate)
        except OSError as error:
            raise UserError(
                f"{candidate} is damaged ({problem}) and cannot be set aside: {first_line(error)}"
            ) from None
        if report:
            report(f"{candidate.name} is damaged ({problem}); set aside as {aside.name}")
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, whole or not.

    Raises:
        StorageError, UserError: if that cannot be told, as whoever finds none trains from scratch.
    """
    found = [name for name in names(folder) if _is_checkpoint(name)]
    return sorted((folder / name for name in found), key=step_of)


def _is_checkpoint(name: str) -> bool:
    return re.fullmatch("step-[0-9]+", name) is not None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def newest_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the newest checkpoint, its files unverified; None if there is none.

    Raises:
        StorageError, UserError: as `list_checkpoints`.
    """
    for candidate in reversed(list_checkpoints(folder)):
        try:
            return read_manifest(candidate)
        except (*ABSENT, ValueError):
            continue
    return None


def describe(folder: Path, *, hashes: bool) -> list[dict[str, Any]]:
    """What there is in `checkpoints/`, oldest first: checkpoints, and what was set aside.

    Args:
        hashes: verify all of each file, not its size alone.

    Returns:
        name, bytes, problem (None for a whole one), and of whole ones step, saved_at (seconds since
        1970), world_size, zero_stage, precision, held_out (nats a token, or None).

    Raises:
        StorageError, UserError: as `list_checkpoints`.
    """
    others = [folder / name for name in names(folder) if name.startswith("step-") and "." in name]
    found = []
    for path in [*list_checkpoints(folder), *others]:
        try:
            size = _size(path)
        except ABSENT:  # a run has renamed or deleted it meanwhile
            continue
        found.append({"name": path.name, "bytes": size, **_describe(path, hashes)})
    return found


def _size(folder: Path) -> int:
    return reach(folder, lambda: sum(file.stat().st_size for file in folder.iterdir()))


def _describe(path: Path, hashes: bool) -> dict[str, Any]:
    if path.suffix:
        unfinished = path.suffix in (UNFINISHED, DELETED)
        return {"problem": "unfinished" if unfinished else "set aside"}
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
        "saved_at": reach(path, (path / MANIFEST).stat).st_mtime,
        **layout,
        "held_out": manifest["held_out"],
    }


def remove(folder: Path, name: str) -> Path:
    """Delete one checkpoint, by its step or its folder's name.

    Raises:
        UserError: if it is not there, the run would go on from it, or it cannot be deleted.
    """
    target = folder / (f"step-{int(name):08d}" if name.isdecimal() else name)
    there = [other for other in names(folder) if other.startswith("step-")]
    if target not in [folder / other for other in there]:
        raise UserError(
            f"there is no checkpoint {name} in {folder}; there are: {', '.join(there) or 'none'}"
        )
    newest_first = reversed(list_checkpoints(folder))
    if target == next((path for path in newest_first if verify(path) is None), None):
        raise UserError(
            f"{target.name} is the newest whole checkpoint, from which the run would go on; to "
            f"delete all of the run, delete {folder.parent}"
        )
    try:
        delete(target)
    except OSError as error:
        raise UserError(f"cannot delete all of {target}: {first_line(error)}") from None
    return target


def retain(
    folder: Path,
    report: Callable[[str], None],
    *,
    last: int,
    every: int = 0,
    best: bool = False,
) -> None:
    """Delete all but the newest `last`, each `every`-th step's, and the best on held-out data.

    Args:
        folder: `checkpoints/` of a run.
        report: told of what cannot be deleted, which ends no run.
    """
    try:
        found = list_checkpoints(folder)
    except (StorageError, UserError) as error:
        return report(f"no checkpoint is deleted: {error}")
    keep = set(found[-last:])
    keep |= {path for path in found if every and step_of(path) % every == 0}
    if best:
        losses: dict[Path, float] = {}
        for path in found:
            try:
                held_out = parse((path / MANIFEST).read_bytes()).get("held_out")
            except (*ABSENT, ValueError):
                continue
            except OSError:  # it may be the best
                keep.add(path)
                continue
            if held_out is not None:
                losses[path] = held_out
        keep |= {min(losses, key=losses.__getitem__)} if losses else set()
    _delete_each((path for path in found if path not in keep), report)


def sweep(folder: Path, report: Callable[[str], None]) -> None:
    """Delete what a crash left of saving and deleting; only while nobody else saves here.

    Args:
        folder: `checkpoints/` of a run.
        report: told of what cannot be deleted, which ends no start.

    Raises:
        StorageError, UserError: as `list_checkpoints`.
    """
    left = [name for name in names(folder) if name.startswith("step-")]
    left = [name for name in left if name.endswith((UNFINISHED, DELETED))]
    _delete_each((folder / name for name in left), report)


def _delete_each(paths: Iterable[Path], report: Callable[[str], None]) -> None:
    for path in paths:
        try:
            delete(path)
        except (OSError, StorageError, UserError) as error:
            report(f"{path} could not be deleted ({first_line(error)}); the next start tries again")


def delete(path: Path) -> None:
    """Delete a checkpoint, which is renamed first, so that none is ever half there; or what is left
    of one.

    Raises:
        OSError: it is not deleted, or not all of it.
    """
    if path.suffix not in (UNFINISHED, DELETED):
        path = path.rename(doomed(path))
    shutil.rmtree(path)


def doomed(path: Path) -> Path:
    """A free name to delete a folder under.

    Raises:
        StorageError, UserError: as `list_checkpoints`.
    """
    more = (f"{path.name}.{number}{DELETED}" for number in count(1))
    return free(path.parent, chain([f"{path.name}{DELETED}"], more))


def set_aside(path: Path) -> Path:
    """Rename a folder out of the way.

    Raises:
        StorageError, UserError: as `list_checkpoints`.
        OSError: it cannot be renamed.
    """
    aside = free(path.parent, (f"{path.name}{DAMAGED}-{number}" for number in count()))
    move(path, aside)
    return aside
