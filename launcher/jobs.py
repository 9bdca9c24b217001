"""Jobs: a configuration is checked, then queued through submitit; later, what became of it.

A job's files lie in its run folder: jobs/ID_submission.sh (SLURM alone), jobs/ID_submitted.pkl and
one log a rank, jobs/ID_RANK_log.out.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from submitit import AutoExecutor, JobEnvironment
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import Checkpointable, TorchDistributedEnvironment

from shards import UserError
from t5vae.config import Config

Cluster = Literal["slurm", "local"]

SUBMITTED = "_submitted.pkl"

# What a job submitted from inside another would inherit; slurm/train.sh says why.
FORGET = (
    "unset SLURM_CPU_BIND SLURM_CPU_BIND_LIST SLURM_CPU_BIND_TYPE SLURM_CPU_BIND_VERBOSE "
    "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT"
)


class Training(Checkpointable):
    """What each task of a job runs: one rank of the training of `config`.

    Training puts its own signal handlers in place of submitit's. Until it has, submitit answers the
    warning signal by queueing the job again, which it does for a Checkpointable alone.
    """

    def __init__(self, config: Config):
        self.config = config

    def __call__(self) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", str(self.config.launcher.cpus_per_task))
        job = JobEnvironment()
        if job.cluster == "local":
            ranks = TorchDistributedEnvironment()
            ranks.master_addr = "127.0.0.1"
            ranks.export(set_cuda_visible_devices=False, overwrite=True)
        from t5vae.training import train

        try:
            train(self.config)
        except UserError as error:
            if job.local_rank == 0:
                print(f"error: {error}", file=sys.stderr)
            # srun ends the other ranks once one has failed; each still exits with its own code.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            sys.exit(2)


@dataclass(frozen=True)
class Job:
    """A job of a run."""

    id: str
    run: Path

    @property
    def is_local(self) -> bool:
        return not (self.run / "jobs" / f"{self.id}_submission.sh").exists()

    def log(self, rank: int = 0) -> Path:
        """What a rank printed, over all restarts of the job."""
        return self.run / "jobs" / f"{self.id}_{rank}_log.out"

    def state(self) -> str:
        """SLURM's word for the job's state, or RUNNING; ENDED where the job is forgotten.

        Raises:
            UserError: SLURM does not answer.
        """
        if self.is_local:  # the id is the process that minds the ranks
            command = _output("ps", "-o", "command=", "-p", self.id).stdout
            return "RUNNING" if "submitit.local" in command else "ENDED"
        queue = _output("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={self.id}")
        if queue.returncode and "Invalid job id" not in queue.stderr:
            raise UserError(f"squeue does not answer: {' '.join(queue.stderr.split())}")
        return queue.stdout.strip() or "ENDED"

    def cancel(self) -> None:
        """Stop the job for good; training saves first if time allows.

        Raises:
            UserError: the job has ended, or SLURM refuses.
        """
        if self.is_local:
            if self.state() == "ENDED":
                raise UserError(f"job {self.id} has ended already")
            os.kill(int(self.id), signal.SIGTERM)
            return
        answer = _output("scancel", self.id)
        if answer.returncode:
            raise UserError(" ".join(answer.stderr.split()))


def find(run_or_job: str | None = None) -> list[Job]:
    """The jobs of a run's folder, the job of an id, or all jobs of the runs in runs/.

    Returns:
        Jobs, the newest last.

    Raises:
        UserError: there is none.
    """
    if run_or_job is None:
        files, where = Path("runs").glob(f"*/jobs/*{SUBMITTED}"), "in runs/"
    elif Path(run_or_job).is_dir():
        files, where = Path(run_or_job).glob(f"jobs/*{SUBMITTED}"), f"in {run_or_job}/jobs"
    else:
        files = Path("runs").glob(f"*/jobs/{run_or_job}{SUBMITTED}")
        where = f"{run_or_job} in runs/, nor such a run folder"
    newest_last = sorted(files, key=lambda file: file.stat().st_mtime)
    if not newest_last:
        raise UserError(f"no job {where}")
    return [Job(file.name.removesuffix(SUBMITTED), file.parent.parent) for file in newest_last]


def submit(config: Config, cluster: Cluster) -> Job:
    """Check a configuration and queue its training.

    Args:
        config: the run's; its section `launcher` says on what.
        cluster: "slurm", or "local" for processes of this machine, which stay when the caller ends.

    Raises:
        UserError: what training would refuse, before anything is queued; or what SLURM refuses.
    """
    nodes, per_node = config.launcher.nodes, ranks_per_node(config)
    config.data.open()
    config.accumulation(nodes * per_node)
    if cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise UserError(
            "this machine has no sbatch: submit from a login node of the cluster, or run here with "
            "--cluster local"
        )
    executor = AutoExecutor(config.run_dir / "jobs", cluster=cluster)
    executor.update_parameters(**parameters(config, cluster))
    try:
        with _own_output():
            job = executor.submit(Training(config))
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"SLURM refuses the job: {' '.join(str(error).split())}") from None
    return Job(job.job_id, config.run_dir)


def ranks_per_node(config: Config) -> int:
    """One rank a GPU; without GPUs, one a node."""
    return max(1, config.launcher.gpus_per_node)


def parameters(config: Config, cluster: Cluster) -> dict[str, Any]:
    """A run's `launcher` section in the words of submitit's AutoExecutor."""
    place, per_node = config.launcher, ranks_per_node(config)
    shared = {
        "name": config.run.name,
        "timeout_min": place.time,
        "cpus_per_task": place.cpus_per_task,
        "stderr_to_stdout": True,
    }
    if cluster == "local":  # submitit knows one node here: this machine takes all ranks
        return shared | {
            "nodes": 1,
            "tasks_per_node": place.nodes * per_node,
            "gpus_per_node": place.nodes * place.gpus_per_node,
        }
    return shared | {
        "nodes": place.nodes,
        "tasks_per_node": per_node,
        "gpus_per_node": place.gpus_per_node or None,
        "slurm_partition": place.partition,
        "slurm_account": place.account,
        "slurm_signal_delay_s": 120,
        "slurm_setup": [FORGET],
        # srun does not take sbatch's --cpus-per-task over.
        "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={place.cpus_per_task}"],
        "slurm_additional_parameters": {"requeue": True},
    }


def _output(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"this machine has no {command[0]}") from None


@contextmanager
def _own_output() -> Iterator[None]:
    """Processes started inside write to nowhere, and keep no pipe of the caller's open."""
    streams = (1, 2)
    kept = [os.dup(stream) for stream in streams]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in streams:
            os.dup2(nowhere, stream)
        yield
    finally:
        for stream, copy in zip(streams, kept, strict=True):
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)
