"""The training run, top to bottom."""

from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from shards import Batch, ShardStream, UserError
from t5vae.config import Config
from t5vae.objective import mmd_weight
from t5vae.training import checkpoint, setup
from t5vae.training.build import build_model
from t5vae.training.distributed import (
    Ranks,
    all_sum,
    raise_together,
    seed_everything,
    start_process_group,
)
from t5vae.training.engine import build_engine, gradient_norm, schedule, set_learning_rate
from t5vae.training.heldout import held_out
from t5vae.training.losses import Step, micro_step, real_tokens
from t5vae.training.preemption import StopRequest, requeue_job
from t5vae.training.runlog import RunLog, Stopwatch, log_libraries_to, quiet_start


def run(config: Config, ranks: Ranks, stop: StopRequest) -> None:
    """Train a T5-VAE; called once in each process of the run.

    Args:
        config: the run's.
        ranks: which process this is.
        stop: set by signals; looked at between steps.

    Raises:
        UserError: for anything a user can mend: no shards, a batch that does not divide, a run
            that cannot be resumed, no disk space, a loss that is no longer finite.
    """
    dataset = setup.check_before_start(config, ranks.world_size)
    identity = setup.identity(config, dataset)
    folder, steps = config.run_dir, config.train.steps
    if setup.is_finished(config, identity):
        if ranks.is_first:
            print(f"{folder} is already trained: {steps:,} steps; raise train.steps to go on")
        return

    setup.make_folder(folder / "logs")
    log_file = folder / "logs" / f"rank-{ranks.rank:05d}.log"
    with quiet_start(log_file):
        device = start_process_group(ranks, compiles=config.model.compile)
        lock = _lock(config, ranks)
        seed_everything(config.run.seed)
        engine = build_engine(build_model(config, dataset, device), config, ranks.world_size)
    log_libraries_to(log_file)
    log = RunLog(config, enabled=ranks.is_first)
    accumulation = config.accumulation(ranks.world_size)
    objective = config.objective
    stream = ShardStream(
        dataset,
        seed=config.run.seed,
        global_batch_size=config.data.global_batch_size,
        micro_batch_size=config.data.micro_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        on_corrupt=config.data.on_corrupt,
        sort_by_length=config.data.sort_by_length,
        pad_to=None if config.model.mask_padding else dataset.max_length,
        pin_memory=device.type == "cuda",
    )
    step = _resume(config, identity, engine, stream, log)
    log.describe(setup.describe(config, dataset, ranks.world_size))
    if ranks.is_first:
        setup.write_config(config)

    clock = Stopwatch()
    skipped = 0
    tokens_since = 0.0
    log.start(step)
    while step < steps:
        with clock.waiting():
            position = stream.consumed
            batches, problem = _fetch(stream, accumulation)
        own_tokens = sum(map(real_tokens, batches))
        tokens, told_to_stop, unread, quarantined = all_sum(
            own_tokens, stop.requested, problem is not None, stream.quarantined, device=device
        )
        if unread:
            raise_together(problem)
        weight = mmd_weight(step, steps, objective.mmd)
        lr_share = schedule(step, steps, config.optim)
        set_learning_rate(engine, lr_share)

        shared = Step(step + 1, position, tokens, weight, ranks.world_size * accumulation)
        parts = []
        for micro, batch in enumerate(batches):
            parts.append(micro_step(engine, batch, micro, shared, config, device))
            engine.step()
        step += 1
        skipped += not engine.was_step_applied()
        tokens_since += tokens

        if step % config.log.every == 0 or step == steps:
            nll = sum(part.nll for part in parts)
            mmd = sum(part.mmd for part in parts) / accumulation
            epps_pulley = sum(part.epps_pulley for part in parts) / accumulation
            reconstruction = nll / (tokens if objective.reconstruction == "mean" else 1)
            regulariser = weight * mmd + objective.epps_pulley.weight * epps_pulley
            log.metrics(
                {
                    "step": step,
                    "loss": reconstruction + regulariser,
                    "reconstruction": reconstruction,
                    "nats_per_token": nll / tokens,
                    "nats_per_sequence": nll / config.data.global_batch_size,
                    "mmd": mmd,
                    "mmd_weight": weight,
                    **({"epps_pulley": epps_pulley} if objective.epps_pulley.weight else {}),
                    "lr": lr_share * config.optim.lr,
                    **gradient_norm(engine, config.optim),
                    "skipped": skipped,
                    **latent_diagnostics(torch.cat([part.codes_BD for part in parts])),
                    "consumed": stream.consumed,
                    **passes(stream),
                    "quarantined": int(quarantined),
                    "tokens_per_second": tokens_since / clock.elapsed,
                    "data_wait": clock.waited / clock.elapsed,
                }
            )
            tokens_since = 0
            clock = Stopwatch()
        log.advance(step)

        if config.eval.every and step % config.eval.every == 0:
            nats = held_out(engine, dataset, config.eval.sequences, ranks, device)
            log.say(f"step {step:,}: {nats:.3f} nats a token on held-out sequences")
        due = config.checkpoint.every and step % config.checkpoint.every == 0
        if due or told_to_stop or step == steps:
            _save(config, engine, step, stream, identity, log)
        if told_to_stop:
            log.say(f"told to stop: saved at step {step:,}; the same command goes on from there")
            break

    stream.close()
    log.close()
    (requeue,) = all_sum(stop.requeue and step < steps, device=device)
    if requeue and ranks.is_first:
        requeue_job()
    dist.destroy_process_group()
    if lock:
        lock.close()


def _fetch(stream: ShardStream, count: int) -> tuple[list[Batch], UserError | None]:
    try:
        return [next(stream) for _ in range(count)], None
    except UserError as error:
        return [], error


def _lock(config: Config, ranks: Ranks) -> IO[str] | None:
    """Lock the run's folder, or refuse on all ranks: one that left alone would hang the rest."""
    lock, problem = None, None
    if ranks.is_first:
        try:
            lock = setup.prepare_run_dir(config)
        except UserError as error:
            problem = error
    raise_together(problem)
    return lock


def passes(stream: ShardStream) -> dict[str, float]:
    """How often the data were gone through: all of them, and each dataset of a mixture."""
    total = stream.consumed / stream.dataset.sequences("train")
    if len(stream.epochs) == 1:
        return {"epoch": total}
    return {"epoch": total, **{f"epoch/{path}": n for path, n in stream.epochs.items()}}


def latent_diagnostics(z_BD: Tensor) -> dict[str, float]:
    """How this rank's codes compare with N(0, I), for which all three figures are about 1, 1, 0.

    Returns:
        latent_variance: mean over the coordinates; latent_square: mean |z|^2 / D;
        latent_saturated: share of coordinates beyond 0.99 in size and below 1, as tanh leaves them.
    """
    z_BD = z_BD.float()
    size = z_BD.abs()
    return {
        "latent_variance": z_BD.var(0).mean().item(),
        "latent_square": z_BD.square().mean().item(),
        "latent_saturated": ((size > 0.99) & (size <= 1)).float().mean().item(),
    }


def _resume(
    config: Config, identity: dict[str, Any], engine: Any, stream: ShardStream, log: RunLog
) -> int:
    """Go on from the newest valid checkpoint; the step it was saved at, or 0."""
    folder = config.run_dir / "checkpoints"
    found = [checkpoint.newest_valid(folder, log.say) if log.enabled else None]
    dist.broadcast_object_list(found, src=0)
    if found[0] is None:
        log.drop_after(0)
        return 0
    manifest = checkpoint.read_manifest(found[0])
    checkpoint.check_identity(manifest, {**identity, "world_size": dist.get_world_size()})
    checkpoint.load(found[0], engine)
    stream.load_state_dict(manifest["data"])
    log.drop_after(manifest["step"])
    log.say(f"resuming from {found[0]}")
    return manifest["step"]


def _save(
    config: Config,
    engine: Any,
    step: int,
    stream: ShardStream,
    identity: dict[str, Any],
    log: RunLog,
) -> None:
    folder = config.run_dir / "checkpoints"
    try:
        saved = checkpoint.save(
            folder, engine, step=step, data=stream.state_dict(), identity=identity
        )
    except OSError as error:
        raise UserError(
            f"step {step:,} could not be saved ({error}); the checkpoints before it are untouched: "
            "free some space and run the same command again"
        ) from None
    if log.enabled:
        checkpoint.retain(folder, config.checkpoint.keep_last)
    log.say(f"saved {saved}")
