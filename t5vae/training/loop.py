"""The training run, top to bottom."""

import math
import shlex
from functools import partial
from typing import IO, Any

import torch
import torch.distributed as dist

from shards import Dataset, ShardStream
from t5vae.checkpoint import retention
from t5vae.checkpoint.randomness import be_deterministic, seed_everything
from t5vae.checkpoint.resuming import resume
from t5vae.checkpoint.saving import Saved, Saver
from t5vae.cluster import attempts, run_folder
from t5vae.cluster.agreement import all_sum, check_shared, from_first, raise_together
from t5vae.cluster.preflight import Meeting
from t5vae.cluster.process_group import limit_waiting, start_process_group
from t5vae.cluster.ranks import Ranks
from t5vae.cluster.scheduler import queue_again
from t5vae.cluster.stopping import StopRequest
from t5vae.common.errors import UserError
from t5vae.common.quiet import log_libraries_to, quiet_start
from t5vae.config import Config
from t5vae.metrics.runlog import RunLog
from t5vae.objective import mmd_weight
from t5vae.training import setup
from t5vae.training.anomalies import Watch, gone_wrong
from t5vae.training.budget import fix_steps, with_steps_before
from t5vae.training.build import build_model, fetch, open_stream
from t5vae.training.engine import (
    build_engine,
    gradient_norm,
    schedule,
    set_learning_rate,
    sharded,
)
from t5vae.training.meter import Meter, peak_flops, work_of
from t5vae.training.midrun import Findings, Probe
from t5vae.training.precision import settle
from t5vae.training.profiling import Profiler, phase
from t5vae.training.step import Step, latent_diagnostics, micro_step, real_tokens, step_metrics


def run(config: Config, ranks: Ranks, stop: StopRequest) -> None:
    """Train a T5-VAE; called once in each process of the run.

    Args:
        config: the run's.
        ranks: which process this is.
        stop: set by signals; looked at between steps.

    Raises:
        UserError: for anything a user can mend: no shards, a batch that does not divide, a run
            that cannot be resumed, no disk space, losses that stay not finite.
    """
    with Meeting(config, ranks) as meeting:
        dataset = setup.check_before_start(config, ranks.world_size)
    config, identity = with_steps_before(config), setup.identity(config, dataset)
    folder = config.run_dir
    if setup.is_finished(config, identity):
        if ranks.is_first:
            print(
                f"{folder} is already trained: {config.train.steps:,} steps; raise "
                f"train.{'minutes' if config.train.minutes else 'steps'} to go on"
            )
        return

    run_folder.make_folder(folder / "logs")
    log_file = folder / "logs" / f"rank-{ranks.rank:05d}.log"
    with quiet_start(log_file):
        if config.train.deterministic:
            be_deterministic()
        device = start_process_group(
            ranks,
            config.train.timeout,
            compiles=config.model.compile,
            interface=config.launcher.interface,
        )
        lock, attempt = _lock(config, ranks)
        health = meeting.report(device)
        before = from_first(setup.layout_before(config))
        config, reasons = settle(config, dataset, device, before)
        build = partial(_build, config, dataset, ranks.world_size, device)
        config, fixed = fix_steps(config, dataset, device, build)
        engine = build()
        limit_waiting(config.train.timeout)
    log_libraries_to(log_file)
    log = RunLog(config, enabled=ranks.is_first)
    log.attempt(attempt, health)
    for reason in reasons + fixed:
        log.say(reason)
    accumulation, steps = config.accumulation(ranks.world_size), config.train.steps
    stream = open_stream(config, dataset, ranks.rank, ranks.world_size, device)
    watch = Watch(config.train.max_bad_steps, config.train.spike)
    saver = Saver(folder / "checkpoints", asynchronous=config.checkpoint.asynchronous)
    layout = setup.layout(config, ranks.world_size)
    seed_everything(config.run.seed + ranks.rank)
    start = resume(config, identity, layout, engine, stream, watch, log)
    step = start.step
    log.describe(setup.describe(config, dataset, ranks.world_size))
    if ranks.is_first:
        config.write()

    log.start(step)
    probe = Probe(engine, dataset, config) if config.eval.every else None
    profiler = Profiler(config, ranks.rank, log.say)
    work = work_of(engine.module.config)
    meter = Meter(device, ranks.world_size, peak_flops(device, half=config.train.half))
    while step < steps:
        with meter.pause():
            profiler.step(step)
        with meter.waiting(), phase("data"):
            position = stream.consumed
            batches, problem = fetch(stream, accumulation)
        tokens, flops, told_to_stop, unread, quarantined, written = all_sum(
            sum(map(real_tokens, batches)),
            sum(map(work, batches)),
            stop.requested,
            problem is not None,
            stream.quarantined,
            saver.written,
            device=device,
        )
        if unread:
            raise_together(problem)
        if written == ranks.world_size:
            _finish_save(saver, config, log, last=False)
        weight = mmd_weight(step, steps, config.objective.mmd)
        lr_share = schedule(step, steps, config.optim)
        set_learning_rate(engine, lr_share)

        shared = Step(step + 1, position, tokens, weight, ranks.world_size * accumulation)
        losses = []
        for micro, batch in enumerate(batches):
            losses.append(micro_step(engine, batch, micro, shared, config, device))
            with phase("optimizer"):
                engine.step()
        step += 1
        meter.count(sequences=config.data.global_batch_size, tokens=tokens, flops=flops)
        metrics = step_metrics(losses, shared, config) | gradient_norm(engine, config.optim)
        told = watch.look(
            applied=engine.was_step_applied(),
            nonfinite_ranks=sorted({rank for loss in losses for rank in loss.nonfinite_ranks}),
            figures={k: metrics[k] for k in ("nats_per_token", "grad_norm") if k in metrics},
        )
        due = config.checkpoint.every and step % config.checkpoint.every == 0
        findings: Findings | None = None
        wanted = probe and (step % config.eval.every == 0 or due or step == steps)
        if probe and wanted and not told_to_stop:
            with meter.pause(), phase("evaluation"):
                findings = probe.look()
        if step % config.log.every == 0 or step == steps or told or findings:
            log.metrics(
                {
                    "step": step,
                    **metrics,
                    **latent_diagnostics(losses),
                    "lr": lr_share * config.optim.lr,
                    **watch.counts,
                    "consumed": stream.consumed,
                    **passes(stream),
                    "quarantined": int(quarantined),
                    **meter.read(),
                    **(findings.figures if findings else {}),
                    **({"event": told, "position": position} if told else {}),
                }
            )
        log.advance(step)
        if findings:
            log.say(f"step {step:,}: {findings}")
            log.tables(step, findings.tables)
        if told:
            log.say(f"step {step:,}: {told} (the batch from position {position:,})")
            if watch.is_over:
                raise gone_wrong(watch, f"step {step:,}: {told}", _replay(config, position))

        last = bool(told_to_stop) or step == steps
        if due or last:
            with meter.pause(), phase("save"):
                _finish_save(saver, config, log, last=False)
                saver.start(
                    engine,
                    step,
                    {
                        **identity,
                        "layout": layout,
                        "data": stream.state_dict(),
                        "watch": watch.state_dict(),
                        "held_out": _finite(findings.held_out) if findings else None,
                        "weights_from": start.weights_from,
                    },
                )
                if last or not config.checkpoint.asynchronous:
                    _finish_save(saver, config, log, last=last)
        if told_to_stop:
            log.say(f"{stop.reason}: saved at step {step:,}; the same command goes on from there")
            break

    profiler.close(step)
    stream.close()
    saver.close()
    log.close()
    (requeue,) = all_sum(stop.requeue and step < steps, device=device)
    dist.destroy_process_group()
    if lock:
        lock.truncate(0)
        lock.close()
    if requeue and ranks.is_first:
        queue_again()


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _build(config: Config, dataset: Dataset, world_size: int, device: torch.device) -> Any:
    """The engine around a new model."""
    with sharded(config, world_size):
        model = build_model(config, dataset, device)
    return build_engine(model, config, world_size)


def _lock(config: Config, ranks: Ranks) -> tuple[IO[str] | None, int]:
    """Lock the run's folder, or refuse on all ranks: one that left alone would hang the rest.

    Returns:
        On rank 0 the lock, and the number of this attempt.
    """
    lock, attempt, problem = None, 0, None
    if ranks.is_first:
        try:
            anew = config.checkpoint.resume == "never"
            lock = run_folder.lock_run(config.run_dir, anew=anew)
            attempt = attempts.begin(config, ranks.hosts)
        except UserError as error:
            problem = error
    raise_together(problem)
    check_shared(config.run_dir / run_folder.LOCK)
    return lock, attempt


def _finish_save(saver: Saver, config: Config, log: RunLog, *, last: bool) -> None:
    """Commit the checkpoint that was started, if there is one; all ranks together."""
    if not saver.pending:
        return
    try:
        saved: Saved = saver.finish()
    except OSError as error:
        if last or config.checkpoint.on_error == "stop":
            raise UserError(
                f"{saver.tmp.stem} could not be saved ({error}); the checkpoints before it are "
                "untouched: free some space and run the same command again"
            ) from None
        log.say(f"{saver.tmp.stem} could not be saved ({error}); training goes on without it")
        return
    if log.enabled:
        keep = config.checkpoint
        retention.retain(
            saver.folder, last=keep.keep_last, every=keep.keep_every, best=keep.keep_best
        )
    log.saved(saved)


def _replay(config: Config, position: int) -> str:
    """The command that shows a batch."""
    shards = config.data.shards
    paths = [shards] if isinstance(shards, str) else [source.path for source in shards]
    weights = [] if isinstance(shards, str) else [f"--weight={source.weight}" for source in shards]
    where = {
        "position": position,
        "batch": config.data.global_batch_size,
        "seed": config.run.seed,
    }
    options = [f"--{name}={value}" for name, value in where.items()]
    return shlex.join(["t5vae", "shards", "inspect", *paths, *weights, *options])


def passes(stream: ShardStream) -> dict[str, float]:
    """How often the data were gone through: all of them, and each dataset of a mixture."""
    total = stream.consumed / stream.dataset.sequences("train")
    if len(stream.epochs) == 1:
        return {"epoch": total}
    return {"epoch": total, **{f"epoch/{path}": n for path, n in stream.epochs.items()}}
