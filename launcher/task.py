"""What each task of a job runs: one rank of the training of a configuration."""

import os
import sys

from submitit import JobEnvironment
from submitit.helpers import Checkpointable

from launcher.backends import BACKENDS
from launcher.jobs import Job, queue
from t5vae.cluster.scheduler import job_id
from t5vae.config import Config


class Training(Checkpointable):
    """One rank of a training run.

    Training puts its own signal handlers in place of submitit's. Until it has, submitit answers the
    warning signal by queueing the job again, which it does for a Checkpointable alone.

    Args:
        config: the run's.
        cluster: the name of the backend that queues it; without one submitit's, as of jobs that
            0.1 queued.
    """

    cluster: str | None = None

    def __init__(self, config: Config, cluster: str | None = None):
        self.config, self.cluster = config, cluster

    def __call__(self) -> None:
        """Train; a process that ends otherwise than well exits with a code of its own."""
        os.environ.setdefault("OMP_NUM_THREADS", str(self.config.launcher.cpus_per_task))
        BACKENDS[self._cluster()].enter()
        from t5vae.training import exit_code_of

        code = exit_code_of(self._train)
        if code:
            sys.exit(code)

    def _train(self) -> None:
        from t5vae.training import UnhealthyError, train

        try:
            train(self.config)
        except UnhealthyError as error:
            if self.config.launcher.exclude_unhealthy and error.is_first_healthy:
                job = self._queue_without(error.hosts)
                print(f"job {job.id} takes over, without {', '.join(error.hosts)}", flush=True)
                error.weather = False  # this job need not come back
            raise

    def _queue_without(self, hosts: list[str]) -> Job:
        """Queue the run again without some hosts; it starts once this job ends."""
        place = self.config.launcher
        excluded = ",".join([*filter(None, [place.exclude]), *hosts])
        place = place.model_copy(update={"exclude": excluded})
        config = self.config.model_copy(update={"launcher": place})
        after = [*filter(None, [job_id()])]
        task, cluster = Training(config, self.cluster), self._cluster()
        (job,) = queue([task], cluster, config.run_dir / "jobs", after)
        return job

    def _cluster(self) -> str:
        return self.cluster or JobEnvironment().cluster
