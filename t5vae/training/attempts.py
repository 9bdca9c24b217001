"""Attempts: each start of training in a run's folder, and the end of a job that gets nowhere."""

import json
import time
from typing import Any

from shards.errors import UserError
from t5vae.config import Config
from t5vae.training.checkpoint import newest_manifest
from t5vae.training.preemption import job_id

ATTEMPTS = "attempts.jsonl"


def begin(config: Config, hosts: tuple[str, ...]) -> int:
    """Write down that training starts; rank 0 alone, with the folder locked.

    Args:
        config: the run's.
        hosts: where the ranks are; empty where that is unknown.

    Returns:
        The attempt's number, from 1.

    Raises:
        UserError: if this job was started again `launcher.max_restarts` times already since its
            newest checkpoint.
    """
    path = config.run_dir / ATTEMPTS
    before = _read(path.read_text()) if path.exists() else []
    manifest = newest_manifest(config.run_dir / "checkpoints")
    step = manifest["step"] if manifest else 0
    job = job_id()
    in_vain = 0
    for attempt in reversed(before):
        if job is None or (attempt["job"], attempt["step"]) != (job, step):
            break
        in_vain += 1
    if in_vain > config.launcher.max_restarts:
        raise UserError(
            f"job {job} was started {in_vain} times from step {step:,} and saved nothing since: it "
            "gives up; see why in its log, then submit the run again"
        )
    attempt = {
        "attempt": len(before) + 1,
        "job": job,
        "step": step,
        "hosts": sorted(set(hosts)),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    tmp = path.with_suffix(".tmp")
    tmp.write_text("".join(json.dumps(line) + "\n" for line in [*before, attempt]))
    tmp.replace(path)
    return len(before) + 1


def _read(text: str) -> list[dict[str, Any]]:
    """All attempts; a line that a crash cut short is left out."""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
