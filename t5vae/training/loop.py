"""The training run, top to bottom."""

from t5vae.checkpoint.checkpoints import Checkpoints
from t5vae.checkpoint.resuming import resume
from t5vae.cluster.agreement import all_sum
from t5vae.cluster.phases import begin_step, phase
from t5vae.cluster.preflight import Preflight
from t5vae.cluster.scheduler import queue_again
from t5vae.cluster.stopping import StopRequest
from t5vae.cluster.together import Together
from t5vae.config import Config
from t5vae.training.anomalies import Anomalies
from t5vae.training.collecting import collected_between_steps
from t5vae.training.engine import backward, gradient_norm, schedule, set_learning_rate, update
from t5vae.training.feed import open_feed
from t5vae.training.job import resolve
from t5vae.training.meter import Meter, peak_flops
from t5vae.training.midrun import GivenUpError, MidRunEvaluation
from t5vae.training.outcome import Outcomes
from t5vae.training.profiling import Profiler
from t5vae.training.start import started
from t5vae.training.step import Loss


def run(config: Config, together: Together, stop: StopRequest) -> None:
    """Train a T5-VAE; called once in each process of the run.

    Args:
        config: the run's.
        together: its ranks, and which of them this process is.
        stop: set by signals; looked at between steps, and between the batches of an evaluation.

    Raises:
        UserError: for anything a user can mend: no shards, a batch that does not divide, a run
            that cannot be resumed, no disk space, losses that stay not finite.
        StorageError: where shards or the run's folder could not be read or written for minutes.
    """
    ranks = together.ranks
    with Preflight(ranks, config.run_dir, config.train.timeout, together.store) as preflight:
        job = resolve(config, ranks)
    if together.from_first(job.is_finished):
        return job.tell_finished()
    with (
        started(job, preflight) as (job, device, engine, log),
        collected_between_steps() as collect,
    ):
        config, objective, optim = job.config, job.config.objective, job.config.optim
        feed, loss = open_feed(job, device), Loss(objective, config.run.seed, job.split, device)
        outcomes = Outcomes(loss.shares)
        anomalies = Anomalies(config.train.max_bad_steps, config.train.spike)
        with phase("resume"):
            start = resume(job.folder, config.checkpoint, job.identity, job.layout, engine, log)
        if start.done:
            feed.load_state_dict(start.data)
            anomalies.load_state_dict(start.anomalies)
        if ranks.is_first:
            config.write()
        log.start(start.done, job.summary)
        of_run = job.identity | {"layout": job.layout, "weights_from": start.weights_from}
        checkpoints = Checkpoints(job.folder / "checkpoints", config.checkpoint, of_run, log)
        profiler = Profiler(config.train.profile, job.folder, ranks.rank, log.say)
        meter = Meter(device, job.split, peak_flops(device, half=config.train.half))
        evaluation = MidRunEvaluation(engine, job.dataset, config.eval, lambda: stop.requested)
        evaluate = meter.apart(evaluation.look)
        profile, save = meter.apart(profiler.before), meter.apart(checkpoints.save)

        step = start.done
        for step in log.steps(start.done):
            begin_step(step)
            collect()
            profile(step)
            batches = feed.read()
            said = {"stop": stop.requested, "written": checkpoints.written}
            agreed = feed.agree(batches, **said, shares=outcomes.told())
            outcomes.heard(agreed.sums)
            checkpoints.commit(agreed.written)

            set_learning_rate(engine, share := schedule(step - 1, job.steps, optim))
            weights = objective.weights(step - 1, job.steps)
            loss.begin(feed.position, agreed.tokens, weights, agreed.counting)
            for micro, batch in enumerate(batches):
                backward(engine, loss(engine, batch, micro))
                update(engine)
            meter.count(agreed.tokens, agreed.flops, feed.waited)
            about = {"lr": share * optim.lr} | feed.figures()
            norm = gradient_norm(engine, optim)
            outcome = loss.end(step, engine.was_step_applied(), norm, about)

            ends, findings = agreed.stop, None
            if job.evaluates_after(step) and not ends:
                try:
                    findings = evaluate()
                except GivenUpError:
                    ends = True
            logs, saves = bool(findings) or job.logs_after(step), ends or job.saves_after(step)
            for past in outcomes.after(outcome, wait=logs or saves):
                figures = past.figures()
                event = anomalies.look(figures, past.applied, past.nonfinite_ranks())
                if event or (logs and past is outcome):
                    figures |= past.latent_diagnostics() | anomalies.counts | meter.read()
                    log.step(past.step, figures, findings if past is outcome else None, event)
                replay = job.replay(past.position, feed.order_version)
                anomalies.stop_if_over(f"step {past.step:,}: {event}", replay)

            if saves:
                state = {"data": feed.state_dict(), "watch": anomalies.state_dict()}
                held_out = {"held_out": findings and findings.held_out}
                save(engine, step, state | held_out, last=ends or step == job.steps)
            if ends:
                log.stopped(step, stop.reason)
                break

        for part in (profiler, feed, checkpoints):
            part.close()
        (again,) = all_sum(stop.requeue and step < job.steps)
    if again and ranks.is_first:
        queue_again()
