"""Submission: configurations are checked, made ready in their run folders, and queued."""

import itertools
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from submitit import AutoExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import _make_sbatch_string

from launcher.jobs import Cluster, Job, cancel, holder, now
from launcher.task import Training
from t5vae.common.errors import UserError
from t5vae.config import Config, load_config

# What a job submitted from inside another would inherit; slurm/train.sh says why.
FORGET = (
    "unset SLURM_CPU_BIND SLURM_CPU_BIND_LIST SLURM_CPU_BIND_TYPE SLURM_CPU_BIND_VERBOSE "
    "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT"
)
# A container lacks SLURM's commands: training then asks by an exit code to be queued again.
QUEUE_AGAIN = ["code=$?", '[ "$code" -ne 75 ] || scontrol requeue "$SLURM_JOB_ID"', 'exit "$code"']
BASE_FILES = ["*.json", "*.model", "*.txt"]


def sweep(path: str | Path, overrides: list[str], axes: list[str]) -> list[Config]:
    """The configurations of a sweep: every combination of the values of its axes.

    Each has a run folder of its own in the folder that the configuration names.

    Args:
        path: of the configuration.
        overrides: for all of them.
        axes: `dotted.key=value,value,...`, each.

    Raises:
        UserError: as `load_config`; or for an axis without values.
    """
    choices = []
    for axis in axes:
        key, _, text = axis.partition("=")
        try:
            values = yaml.safe_load(f"[{text}]")
        except yaml.YAMLError:
            values = None
        if not values or key.startswith(("launcher.", "run.name", "run.output_dir")):
            raise UserError(f"{axis!r} is not a sweep; write section.key=value,value,...")
        choices.append([(key, value) for value in values])
    base = load_config(path, overrides)
    found = []
    for combination in itertools.product(*choices):
        parts = (f"{key.rpartition('.')[2]}={value}" for key, value in combination)
        label = ",".join(parts).replace("/", "_")
        own = {
            **dict(combination),
            "run.name": f"{base.run.name}-{label}",
            "run.output_dir": str(base.run_dir / label),
        }
        # JSON is YAML, with strings safely quoted
        changes = [f"{key}={json.dumps(value)}" for key, value in own.items()]
        found.append(load_config(path, [*overrides, *changes]))
    if len({config.run_dir for config in found}) < len(found):
        raise UserError("two runs of the sweep would share a folder: name each value once")
    return found


def submit(
    configs: list[Config], cluster: Cluster, folder: Path | None = None, *, force: bool = False
) -> list[Job]:
    """Check configurations and queue their training; several become a job array.

    Args:
        configs: of runs that differ in nothing that the launcher section says.
        cluster: "slurm", or "local" for processes of this machine, which stay when the caller ends.
        folder: of submitit's files and the logs; by default jobs/ of the first run.
        force: queue a run that a live job holds too, to start once that has ended.

    Raises:
        UserError: what training would refuse, before anything is queued; a run folder that a live
            job holds; what SLURM refuses; or a folder that cannot be written.
    """
    if cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise UserError(
            "this machine has no sbatch: submit from a login node of the cluster, or run here with "
            "--cluster local"
        )
    for config in configs:
        check(config)
    after = _wait_for(configs, force)
    new = [config.run_dir for config in configs if not config.run_dir.exists()]
    folder = folder or configs[0].run_dir / "jobs"
    try:
        return _queue([make_ready(config) for config in configs], cluster, folder, after)
    except (UserError, OSError) as error:
        for run in new:
            shutil.rmtree(run, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write the run's folder: {error}") from None
        raise


def check(config: Config) -> None:
    """Refuse what training would refuse, as far as that can be told without a compute node.

    Raises:
        UserError: for shards that are missing, or a batch that cannot be dealt to the ranks.
    """
    config.data.open()
    config.accumulation(config.launcher.nodes * ranks_per_node(config))


def _wait_for(configs: list[Config], force: bool) -> list[str]:
    """Ids of the jobs of SLURM that hold the runs' folders."""
    holders = [job for config in configs if (job := holder(config.run_dir))]
    if holders and not force:
        job = holders[0]
        raise UserError(
            f"{job.run} is held by job {job.id}: cancel it, choose another run.output_dir, or "
            "queue this to start after it with --force"
        )
    return [job.id for job in holders if job.cluster == "slurm"]


def make_ready(config: Config) -> Config:
    """Put into the run's folder what a compute node without internet cannot fetch.

    That is a base named on Hugging Face, its weights and tokenizer; and the whole configuration,
    where training has not written it yet. The shards hold their own tokenizer.

    Raises:
        UserError: if the base cannot be had.
    """
    base = config.model.base
    config.run_dir.mkdir(parents=True, exist_ok=True)
    if base is not None and not Path(base).exists():
        here = config.run_dir / "base"
        if not here.exists():
            shutil.copytree(_download(base), here)
        model = config.model.model_copy(update={"base": str(here)})
        config = config.model_copy(update={"model": model})
    if not (config.run_dir / "checkpoints").exists():
        config.write()
    return config


def _download(base: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = snapshot_download(base, allow_patterns=[*BASE_FILES, "*.safetensors"])
        if not any(Path(path).glob("*.safetensors")):
            path = snapshot_download(base, allow_patterns=[*BASE_FILES, "*.bin"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot download model.base {base!r}: give a folder with a pretrained T5, or a "
            f"Hugging Face name ({reason})"
        ) from None
    return path


def submit_without(hosts: list[str], config: Config) -> Job:
    """Queue a run again, from inside its job, without some hosts; it starts once this job ends."""
    excluded = ",".join([*filter(None, [config.launcher.exclude]), *hosts])
    place = config.launcher.model_copy(update={"exclude": excluded})
    config = config.model_copy(update={"launcher": place})
    after = [os.environ["SLURM_JOB_ID"]]
    return _queue([config], "slurm", config.run_dir / "jobs", after)[0]


def _queue(configs: list[Config], cluster: Cluster, folder: Path, after: list[str]) -> list[Job]:
    place = configs[0].launcher
    python = {"slurm_python": place.python} if place.python and cluster == "slurm" else {}
    executor = AutoExecutor(folder, cluster=cluster, **python)
    if cluster == "slurm":
        settings = {f"slurm_{key}": value for key, value in options(configs, after).items()}
    else:
        settings = local_options(configs[0])
    executor.update_parameters(**settings)
    try:
        with _own_output(), executor.batch():
            queued = [executor.submit(Training(config)) for config in configs]
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"SLURM refuses the job: {' '.join(str(error).split())}") from None
    jobs = [
        Job(job.job_id, config.run_dir, cluster, str(folder), now())
        for job, config in zip(queued, configs, strict=True)
    ]
    try:
        for job in jobs:
            job.record()
    except OSError:
        cancel(jobs)
        raise
    return jobs


def script(configs: list[Config], folder: Path | None = None) -> str:
    """The sbatch script that `submit` would queue."""
    folder = folder or configs[0].run_dir / "jobs"
    python = configs[0].launcher.python or shlex.quote(sys.executable)
    command = f"{python} -u -m submitit.core._submit {shlex.quote(str(folder.absolute()))}"
    count = len(configs) if len(configs) > 1 else None
    settings = options(configs, [])
    return _make_sbatch_string(command, folder.absolute(), map_count=count, **settings)


def ranks_per_node(config: Config) -> int:
    """One rank a GPU; without GPUs, one a node."""
    return max(1, config.launcher.gpus_per_node)


def options(configs: list[Config], after: list[str]) -> dict[str, Any]:
    """The `launcher` section of runs, in the words of submitit's SLURM executor.

    Args:
        configs: of a run, or of a sweep's.
        after: jobs that must end first.
    """
    config = configs[0]
    place = config.launcher
    as_they_are = (
        *("nodes", "cpus_per_task", "time", "partition", "account", "qos", "constraint", "exclude"),
        *("gres", "mem", "mail_user", "mail_type", "array_parallelism"),
    )
    others = {key: value for key, value in (place.slurm or {}).items() if value is not False}
    settings = {
        **{name: getattr(place, name) for name in as_they_are},
        "job_name": config.run.name if len(configs) == 1 else config.run_dir.parent.name,
        "ntasks_per_node": ranks_per_node(config),
        "gpus_per_node": None if place.gres else place.gpus_per_node or None,
        "dependency": f"afterany:{':'.join(after)}" if after else None,
        "signal_delay_s": place.signal_delay,
        "stderr_to_stdout": True,
        "setup": [FORGET, *place.setup],
        "teardown": QUEUE_AGAIN,
        # srun does not take sbatch's --cpus-per-task over.
        "srun_args": [
            "--kill-on-bad-exit=1",
            f"--cpus-per-task={place.cpus_per_task}",
            *place.srun_args,
        ],
        "additional_parameters": {"requeue": True, **others},
    }
    return {key: value for key, value in settings.items() if value is not None}


def local_options(config: Config) -> dict[str, Any]:
    """The same for this machine, which takes the ranks of all nodes."""
    place = config.launcher
    return {
        "name": config.run.name,
        "timeout_min": place.time,
        "cpus_per_task": place.cpus_per_task,
        "stderr_to_stdout": True,
        "nodes": 1,
        "tasks_per_node": place.nodes * ranks_per_node(config),
        "gpus_per_node": place.nodes * place.gpus_per_node,
    }


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
