"""Where a run starts: at its newest checkpoint, at the weights of another, or at nothing."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import safe_open

from t5vae.checkpoint import fragments, retention
from t5vae.checkpoint.manifest import (
    MANIFEST,
    check_identity,
    open_fragments,
    read_manifest,
    verify,
)
from t5vae.checkpoint.randomness import seed_everything, set_random_state
from t5vae.cluster.agreement import from_first, raise_together
from t5vae.common.errors import UserError
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
        UserError: if the checkpoint is another run's, or there are no weights to start from.
    """
    seed_everything(identity["seed"] + dist.get_rank())
    newest, weights, problem = None, None, None
    if log.enabled:
        try:
            newest, weights = _find(folder, settings, identity, log)
        except UserError as error:
            problem = error
    raise_together(problem)
    newest, weights = from_first((newest, weights))
    if weights is not None:
        fragments.load_weights(engine, open_fragments(weights))
        log.drop_after(0)
        log.say(f"starting from the weights of {weights}")
        return Start(weights_from=str(weights))
    if newest is None:
        log.drop_after(0)
        return Start()
    manifest = read_manifest(newest)
    check_identity(manifest, identity)
    fragments.load(engine, open_fragments(newest), manifest["scalars"])
    _load_random_state(newest, manifest, identity["seed"])
    log.drop_after(manifest["step"])
    log.say(f"resuming from {newest}")
    for name, now in layout.items():
        before = manifest["layout"].get(name, now)  # an older version's has fewer
        if before != now:
            log.say(f"{name.replace('_', ' ')}: {before} before, {now} now")
    return Start(manifest["step"], manifest["data"], manifest["watch"], manifest["weights_from"])


def _find(
    run: Path, settings: Checkpoint, identity: dict[str, Any], log: RunLog
) -> tuple[Path | None, Path | None]:
    """The checkpoint to go on from, or the one to take weights from; rank 0 alone."""
    folder = run / "checkpoints"
    retention.sweep(folder)
    newest = retention.newest_valid(folder, log.say)
    if newest is None:
        _refuse_damaged(folder)
    if settings.resume != "weights":
        return newest, None
    if newest is not None and read_manifest(newest).get("weights_from"):
        return newest, None
    if settings.source:
        if newest is not None:
            raise UserError(
                f"{run} holds checkpoints of a run of its own: choose another "
                "run.output_dir, or leave out checkpoint.source to set that run aside"
            )
        return None, _source(Path(settings.source), identity)
    if newest is not None:
        _source(newest, identity)  # refuses before anything is moved
        _set_run_aside(run)
    before = sorted(run.glob("before-*"), key=lambda path: path.stat().st_mtime_ns)
    return None, _source(before[-1] if before else run, identity)


def _refuse_damaged(folder: Path) -> None:
    """Never train from scratch over checkpoints that are all damaged."""
    damaged = sorted(path.name for path in folder.glob("step-*.damaged-*"))
    if damaged:
        raise UserError(
            f"every checkpoint in {folder} is damaged ({', '.join(damaged)}): restore one from a "
            "copy, or choose another run.output_dir to train from the start"
        )


def _source(path: Path, identity: dict[str, Any]) -> Path:
    """The newest whole checkpoint of a run, or the one that is named, if the model is the same."""
    candidates = [path] if (path / MANIFEST).is_file() else []
    candidates = candidates or retention.list_checkpoints(path / "checkpoints")[::-1]
    whole = (found for found in candidates if verify(found) is None)
    found = next(whole, None)
    if found is None:
        raise UserError(
            f"{path} holds no whole checkpoint to take weights from: set checkpoint.source to a "
            "run that has one, or leave out checkpoint.resume"
        )
    shared = {name: identity[name] for name in ("format", "tokenizer", "model")}
    check_identity(read_manifest(found), shared)
    return found


def _set_run_aside(run: Path) -> None:
    number = 0
    while (aside := run / f"before-{number}").exists():
        number += 1
    aside.mkdir()
    for name in ("checkpoints", "metrics.jsonl"):
        if (run / name).exists():
            (run / name).rename(aside / name)
    (run / "checkpoints").mkdir()


def _load_random_state(newest: Path, manifest: dict[str, Any], seed: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    if manifest["layout"]["world_size"] != world:
        seed_everything(seed + rank + (manifest["step"] << 20))
        return
    with safe_open(newest / f"rank-{rank:05d}.safetensors", framework="pt") as file:
        keys = [key for key in file.keys() if key.startswith("random/")]  # noqa: SIM118
        tensors = {key.split("/")[1]: file.get_tensor(key) for key in keys}
        set_random_state(tensors, file.metadata()["random"])
