"""Checkpoints that are either whole or not there.

Every rank saves into `step-00001000.tmp/`; each file is hashed by the rank that wrote it; the
manifest is written last; the folder is renamed. A folder without a manifest that verifies is no
checkpoint: resuming sets it aside and takes the one before.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from shards.errors import UserError

DEEPSPEED = "deepspeed"
MANIFEST = "manifest.json"


def save(
    folder: Path, engine: Any, *, step: int, data: dict[str, Any], identity: dict[str, Any]
) -> Path:
    """Save a checkpoint, all ranks together.

    Args:
        folder: `checkpoints/` of the run, shared by all ranks.
        step: steps done.
        data: the stream's state.
        identity: what a run that resumes must agree with, see `check_identity`.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: if any rank could not write; the checkpoints that exist stay valid.
    """
    rank = dist.get_rank()
    target = folder / f"step-{step:08d}"
    tmp = folder / f"{target.name}.tmp"
    if rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    dist.barrier()

    error: Exception | None = None
    digests: dict[str, dict[str, Any]] = {}
    try:
        _save_random_state(tmp / f"rank-{rank:05d}")
    except OSError as caught:
        error = caught
    with _collected_errors(engine) as failures:
        engine.save_checkpoint(str(tmp), tag=DEEPSPEED, save_latest=False)
    error = failures[0] if failures else error
    dist.barrier()
    if error is None:
        try:
            digests = _digests(tmp, rank)
        except OSError as caught:
            error = caught

    reports: list[tuple[dict, str | None]] = [({}, None)] * dist.get_world_size()
    dist.all_gather_object(reports, (digests, None if error is None else str(error)))
    problems = [f"rank {r}: {text}" for r, (_, text) in enumerate(reports) if text]
    if not problems and rank == 0:
        files = {name: digest for found, _ in reports for name, digest in found.items()}
        manifest = {
            "step": step,
            "data": data,
            "world_size": dist.get_world_size(),
            **identity,
            "files": files,
        }
        try:
            sealed = {**manifest, "seal": _seal(manifest)}
            _write_durably(tmp / MANIFEST, json.dumps(sealed, indent=1).encode())
            if target.exists():
                set_aside(target)
            tmp.rename(target)
            _sync_folder(folder)
        except OSError as caught:
            problems = [f"rank 0: {caught}"]
    outcome = [problems]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0]:
        if rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        raise OSError(outcome[0][0])
    return target


def newest_valid(folder: Path, report: Any = None) -> Path | None:
    """The newest checkpoint whose manifest verifies; damaged ones are set aside and reported."""
    for candidate in reversed(list_checkpoints(folder)):
        problem = verify(candidate)
        if problem is None:
            return candidate
        aside = set_aside(candidate)
        if report:
            report(f"{candidate.name} is damaged ({problem}); set aside as {aside.name}")
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, whole or not."""
    return sorted(p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit())


def newest_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the newest checkpoint, its files unverified; None if there is none."""
    for candidate in reversed(list_checkpoints(folder)):
        try:
            return read_manifest(candidate)
        except (OSError, ValueError):
            continue
    return None


def verify(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file's size and sha256 are compared."""
    try:
        files = read_manifest(checkpoint)["files"]
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    for name, wanted in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {wanted['bytes']}"
        if _sha256(path) != wanted["sha256"]:
            return f"{name} has changed"
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's manifest.

    Raises:
        OSError, ValueError: where there is none, or not as it was written.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    if not isinstance(manifest, dict) or manifest.pop("seal", None) != _seal(manifest):
        raise ValueError("it has changed")
    return manifest


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


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


def load(checkpoint: Path, engine: Any) -> None:
    """Load weights, optimiser and random state, all ranks together; nothing is freely unpickled."""
    with _weights_only():
        engine.load_checkpoint(str(checkpoint), tag=DEEPSPEED)
    _load_random_state(checkpoint / f"rank-{dist.get_rank():05d}")


def consolidated_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's fp32 weights from any ZeRO stage, on the CPU, without a process group."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with _weights_only():
        if read_manifest(checkpoint)["zero_stage"] == 0:
            path = checkpoint / DEEPSPEED / "mp_rank_00_model_states.pt"
            return {k: v.float() for k, v in torch.load(path, map_location="cpu")["module"].items()}
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=DEEPSPEED)


def digest(checkpoint: Path) -> str:
    """A fingerprint of a checkpoint's content."""
    return _sha256(checkpoint / MANIFEST)


def retain(folder: Path, keep_last: int) -> None:
    """Delete all but the newest checkpoints; each is renamed first, so none is ever half there."""
    for old in list_checkpoints(folder)[:-keep_last]:
        doomed = old.with_name(f"{old.name}.deleted")
        old.rename(doomed)
        shutil.rmtree(doomed)


def set_aside(path: Path) -> Path:
    """Rename a folder out of the way."""
    number = 0
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return path.rename(aside)


def _differences(name: str, saved: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in now | saved:
            yield from _differences(f"{name}.{key}", saved.get(key), now.get(key))
    elif saved != now:
        yield name, saved, now


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _digests(folder: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Sync and hash the files this rank wrote: each is claimed by one rank, by its name's order."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    mine = files[rank :: dist.get_world_size()]
    digests = {}
    for path in mine:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        digests[str(path.relative_to(folder))] = {
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
        }
    return digests


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _collected_errors(engine: Any) -> Iterator[list[Exception]]:
    """Collect what DeepSpeed's writing raises: a rank that left its barriers would hang the rest.

    Its recovery script, a copy of which it would add to each checkpoint, is left out.
    """
    writer = engine.checkpoint_engine
    write = writer.save
    failures: list[Exception] = []

    def save(*args: Any, **kwargs: Any) -> None:
        try:
            write(*args, **kwargs)
        except (OSError, RuntimeError) as caught:
            failures.append(caught)

    writer.save, engine._copy_recovery_script = save, lambda path: None
    try:
        yield failures
    finally:
        writer.save = write
        del engine._copy_recovery_script


def _save_random_state(stem: Path) -> None:
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    plain = {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }
    stem.with_suffix(".json").write_text(json.dumps(plain))
    tensors = {"cpu": torch.get_rng_state()}
    if torch.accelerator.is_available():
        tensors["accelerator"] = torch.get_device_module().get_rng_state()
    save_file(tensors, stem.with_suffix(".safetensors"))


def _load_random_state(stem: Path) -> None:
    plain = json.loads(stem.with_suffix(".json").read_text())
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(plain["numpy"]))
    tensors = load_file(stem.with_suffix(".safetensors"))
    torch.set_rng_state(tensors["cpu"])
    if "accelerator" in tensors and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(tensors["accelerator"])


class _weights_only:  # noqa: N801
    """Make torch.load refuse anything but tensors, containers and DeepSpeed's few own types."""

    def __enter__(self) -> None:
        self.before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
        self.allowed = torch.serialization.safe_globals(_deepspeed_types())
        self.allowed.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.allowed.__exit__(*error)
        if self.before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = self.before


def _deepspeed_types() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
