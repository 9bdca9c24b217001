"""The start of a job: its ranks meet, its folder is locked, what was left open is settled."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from threading import Thread
from typing import IO, Any

import torch

from t5vae.checkpoint.randomness import be_deterministic
from t5vae.checkpoint.retention import newest_manifest
from t5vae.cluster import attempts
from t5vae.cluster.agreement import check_same, check_shared, from_first
from t5vae.cluster.preflight import Preflight
from t5vae.cluster.process_group import leave_process_group, start_process_group
from t5vae.cluster.run_folder import LOCK, lock_run, make_folder
from t5vae.common.quiet import log_libraries_to, quiet_start
from t5vae.metrics.runlog import RunLog
from t5vae.training.budget import fix_steps
from t5vae.training.build import build_model
from t5vae.training.engine import build_engine, sharded
from t5vae.training.job import Job, manifest_before
from t5vae.training.precision import settle
from t5vae.training.tiles import settle_tiles

SECONDS = 5.0  # until a lock is left to itself


@contextmanager
def started(job: Job, preflight: Preflight) -> Iterator[tuple[Job, torch.device, Any, RunLog]]:
    """Start a job, all its ranks together, and give back what it took once it ends well.

    Yields:
        The job with its steps and precisions, this rank's device, DeepSpeed's engine, the log.

    Raises:
        UserError: if another process trains in the run's folder, or not all ranks share it; and
            see `fix_steps`, `build_engine`.
    """
    config, ranks = job.config, job.ranks
    make_folder(job.folder / "logs")
    with quiet_start(job.log_file):
        if config.train.deterministic:
            be_deterministic()
        device = start_process_group(
            ranks,
            config.train.timeout,
            compiles=config.model.compile,
            interface=config.launcher.interface,
        )
        lock, attempt = _claim(job)
        health = preflight.report(device)
        before = from_first(lambda: (manifest_before(job.config) or {}).get("layout", {}))
        config, reasons = settle(config, job.settings, job.split, device, before)
        size, kept = job.settings.latent_size, before.get("tiles", {})
        tiles, tiled = settle_tiles(config.objective, size, job.split, device, kept)
        job, fixed = fix_steps(replace(job, config=config, tiles=tiles), device, build)
        engine = build(job, device)
    log_libraries_to(job.log_file)
    log = RunLog(job.config, enabled=ranks.is_first)
    log.attempt(attempt, health)
    for reason in reasons + tiled + fixed:
        log.say(reason)
    yield job, device, engine, log
    log.close()
    leave_process_group()
    if lock:
        _release(lock)


def build(job: Job, device: torch.device) -> Any:
    """DeepSpeed's engine around a new model."""
    options = job.config.model
    with sharded(job.deepspeed, pretrained=options.base is not None):
        model = build_model(
            job.settings,
            options,
            seed=job.config.run.seed,
            half=job.config.train.half,
            device=device,
        )
    return build_engine(model, job.deepspeed, job.config.optim)


def _release(lock: IO[str]) -> None:
    """Give a lock back; what is trained and saved ends well, whatever its disk does now."""

    def release() -> None:
        with suppress(OSError), lock:
            lock.truncate(0)

    thread = Thread(target=release, name="unlock", daemon=True)
    thread.start()
    thread.join(SECONDS)


def _claim(job: Job) -> tuple[IO[str] | None, int]:
    """Have rank 0 lock the run's folder, and see that all ranks share it and train the same.

    Returns:
        On rank 0 the lock, and the number of this attempt.
    """
    locks = []

    def claim() -> int:
        locks.append(lock_run(job.folder, anew=job.config.checkpoint.resume == "never"))
        newest = newest_manifest(job.folder / "checkpoints")
        return attempts.begin(
            job.folder,
            newest["step"] if newest else 0,
            job.ranks.hosts,
            max_restarts=job.config.launcher.max_restarts,
        )

    attempt = from_first(claim)
    check_shared(job.folder / LOCK)
    check_same(job.identity)
    return next(iter(locks), None), attempt
