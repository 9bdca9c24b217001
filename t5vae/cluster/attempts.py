"""Attempts: each start of training in a run's folder, and the end of a job that gets nowhere."""

from datetime import datetime

from t5vae.checkpoint.retention import newest_manifest
from t5vae.cluster.scheduler import job_id
from t5vae.common.errors import UserError
from t5vae.common.files import read_records, write_records
from t5vae.config import Config

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
            newest checkpoint; or if the attempts cannot be read or written.
    """
    path = config.run_dir / ATTEMPTS
    before = read_records(path)
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
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    try:
        write_records(path, [*before, attempt])
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return len(before) + 1
