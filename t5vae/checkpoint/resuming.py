"""Where a run starts: at its newest checkpoint, at the weights of another, or at nothing."""

from collections.abc import Generator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from t5vae.checkpoint import fragments, retention
from t5vae.checkpoint.files import exists, free, move, names, reach
from t5vae.checkpoint.manifest import (
    MANIFEST,
    check_identity,
    fragments_of,
    read_manifest,
    verify,
)
from t5vae.checkpoint.randomness import seed_everything, set_random_state
from t5vae.checkpoint.rank_files import Fragments, file_name
from t5vae.checkpoint.verifying import verify_together
from t5vae.cluster.agreement import from_first
from t5vae.common.errors import UserError, first_line
from t5vae.config import Checkpoint
from t5vae.metrics.runlog import RunLog


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        done: steps.
        data: the stream's state.
        anomalies: what went wrong so far, as `t5vae.training.anomalies` has it.
        weights_from: the checkpoint whose weights alone the run began with, if any.
    """

    done: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    anomalies: dict[str, Any] = field(default_factory=dict)
    weights_from: str | None = None


class _Found(NamedTuple):
    """What rank 0 found to begin with, for all ranks.

    Attributes:
        checkpoint: None for nothing.
        manifest: its own; empty for nothing.
        weights_alone: leave the rest of it.
    """

    checkpoint: Path | None
    manifest: dict[str, Any]
    weights_alone: bool = False


class _Candidate(NamedTuple):
    """What rank 0 would begin with, for all ranks to verify."""

    checkpoint: Path
    files: dict[str, Any]


_Search = Generator[Path, str | None, _Found]


def resume(
    folder: Path,
    settings: Checkpoint,
    identity: dict[str, Any],
    layout: dict[str, Any],
    engine: Any,
    log: RunLog,
) -> Start:
    """Go on from where the run's folder says, all ranks together.

    Args:
        folder: the run's.
        settings: whether to go on, and from what.
        identity: what the run must have in common with its checkpoint.
        layout: what may differ, which is told then.
        engine: DeepSpeed's, filled with what was saved; so are the generators.
        log: of the run, cut off after the step that it goes on from.

    Raises:
        UserError: if the checkpoint is another run's, there are no weights to start from, or
            files of the run are damaged or cannot be reached.
        StorageError: if its storage failed for minutes.
    """
    seed_everything(identity["seed"] + dist.get_rank())

    newest, manifest, weights_alone = _find_together(folder, settings, identity, log)
    if newest is None:
        return Start()
    with fragments_of(newest, manifest) as saved:
        if weights_alone:
            fragments.load_weights(engine, saved)
            log.say(f"starting from the weights of {newest}")
            return Start(weights_from=str(newest))
        fragments.load(engine, saved, manifest["scalars"])
        _load_random_state(newest, manifest, saved, identity["seed"])
    log.say(f"resuming from {newest}")
    for name, now in layout.items():
        before = manifest["layout"].get(name, now)  # an older version's has fewer
        if before != now:
            log.say(f"{name.replace('_', ' ')}: {before} before, {now} now")
    return Start(manifest["step"], manifest["data"], manifest["watch"], manifest["weights_from"])


def _find_together(
    run: Path, settings: Checkpoint, identity: dict[str, Any], log: RunLog
) -> _Found:
    """What rank 0 finds; what it is about to take, all ranks verify."""
    finding, problem = _find(run, settings, identity, log), None
    while True:
        found = from_first(partial(_next, finding, problem))
        if isinstance(found, _Found):
            return found
        problem = verify_together(found.checkpoint, found.files)


def _next(finding: _Search, problem: str | None) -> _Candidate | _Found:
    try:
        checkpoint = finding.send(problem)
    except StopIteration as end:
        return end.value
    return _Candidate(checkpoint, read_manifest(checkpoint)["files"])


def _find(run: Path, settings: Checkpoint, identity: dict[str, Any], log: RunLog) -> _Search:
    """The checkpoint to go on from, or to take weights from; rank 0 alone.

    Yields:
        One whose sizes are right; what else is wrong with it is to be sent, or None.
    """
    found = yield from _choose(run, settings, identity, log)
    log.drop_after(0 if found.weights_alone else found.manifest.get("step", 0))
    return found


def _choose(run: Path, settings: Checkpoint, identity: dict[str, Any], log: RunLog) -> _Search:
    folder = run / "checkpoints"
    retention.sweep(folder, log.say)
    newest = yield from retention.find_valid(folder, log.say)
    if newest is None:
        _refuse_damaged(folder)
    manifest = {} if newest is None else read_manifest(newest)
    if settings.resume != "weights" or manifest.get("weights_from"):
        if newest is not None:
            check_identity(manifest, identity)
        return _Found(newest, manifest)
    if settings.source:
        if newest is not None:
            raise UserError(
                f"{run} holds checkpoints of a run of its own: choose another "
                "run.output_dir, or leave out checkpoint.source to set that run aside"
            )
        return (yield from _source(Path(settings.source), identity))
    if newest is not None:
        _weights_of(newest, identity)  # refuses before anything is moved
        aside = _set_run_aside(run)
        return _weights_of(aside / "checkpoints" / newest.name, identity)
    before = [run / name for name in names(run) if name.startswith("before-")]
    before.sort(key=lambda path: reach(path, path.stat).st_mtime_ns)
    return (yield from _source(before[-1] if before else run, identity))


def _refuse_damaged(folder: Path) -> None:
    """Never train from scratch over checkpoints that are all damaged."""
    damaged = [name for name in names(folder) if f"{retention.DAMAGED}-" in name]
    if damaged:
        raise UserError(
            f"every checkpoint in {folder} is damaged ({', '.join(damaged)}): restore one from a "
            "copy, or choose another run.output_dir to train from the start"
        )


def _source(path: Path, identity: dict[str, Any]) -> _Search:
    """The newest whole checkpoint of a run, or the one that is named, if the model is the same."""
    candidates = [path] if exists(path / MANIFEST) else []
    candidates = candidates or retention.list_checkpoints(path / "checkpoints")[::-1]
    for candidate in candidates:
        if (verify(candidate, hashes=False) or (yield candidate)) is None:
            return _weights_of(candidate, identity)
    raise UserError(
        f"{path} holds no whole checkpoint to take weights from: set checkpoint.source to a "
        "run that has one, or leave out checkpoint.resume"
    )


def _weights_of(checkpoint: Path, identity: dict[str, Any]) -> _Found:
    manifest = read_manifest(checkpoint)
    shared = {name: identity[name] for name in ("format", "tokenizer", "model")}
    check_identity(manifest, shared)
    return _Found(checkpoint, manifest, weights_alone=True)


def _set_run_aside(run: Path) -> Path:
    aside = free(run, (f"before-{number}" for number in count()))
    try:
        reach(aside, lambda: aside.mkdir(exist_ok=True))
        for name in ("checkpoints", "metrics.jsonl"):
            if exists(run / name):
                move(run / name, aside / name)
        reach(run, lambda: (run / "checkpoints").mkdir(exist_ok=True))
    except OSError as error:
        raise UserError(f"cannot set {run} aside as {aside}: {first_line(error)}") from None
    return aside


def _load_random_state(newest: Path, manifest: dict[str, Any], saved: Fragments, seed: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    if manifest["layout"]["world_size"] != world:
        seed_everything(seed + rank + (manifest["step"] << 20))
        return
    own = saved.header(newest / file_name(rank))
    drawn = {name: pieces[0] for (kind, name), pieces in own.pieces.items() if kind == "random"}
    tensors = {name: saved.read_piece(piece) for name, piece in drawn.items()}
    try:
        set_random_state(tensors, own.metadata["random"])
    except (LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{newest} is damaged: its random numbers' state is none ({first_line(error)}); remove "
            "it to go on from the checkpoint before"
        ) from None
