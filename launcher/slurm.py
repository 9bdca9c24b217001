"""Jobs on SLURM: submitit's, one sbatch script for a run or for the array of a sweep.

What the processes of such a job are told, and ask, is `t5vae.cluster.scheduler`.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from launcher.backend import State, Task, ranks_per_node
from t5vae.cluster.scheduler import AGAIN
from t5vae.common.environment import changed
from t5vae.common.errors import UserError, printable
from t5vae.config import Config

OVER = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"),
    *("DEADLINE", "PREEMPTED", "REVOKED"),
)
NUMBER = re.compile("[0-9]+(_[0-9]+)?")
TEMPLATE = Path(__file__).parent / "scripts" / "train.sh"
SAFE = "PYTHONSAFEPATH"  # what lies in the working folder, such as one called shards, is no package
# What would mislead srun, which that script explains.
FORGET = [line for line in TEMPLATE.read_text().splitlines() if line.startswith("unset ")]
# What sbatch, salloc and srun tell of a job. Who submits from inside one would hand it on: sbatch
# replaces only what the new job has too. Other variables, such as SLURM_CONF, are the user's.
OF_A_JOB = re.compile(
    r"SLURM_(ARRAY|CONTAINER|CORE_SPEC|CPU|DIST|EXPORT_ENV|GET_USER_ENV|GPU|GTIDS|HET_|JOB|LAUNCH_"
    r"|LOCALID|MEM_|NNODES|NODE|NPROCS|NTASKS|OVERCOMMIT|PRIO_PROCESS|PROCID|PROFILE|RESTART_"
    r"|SHARDS_|SRUN_COMM_|STEP|SUBMIT_|TASK|THREADS_|TOPOLOGY_|TRES_).*"
)
FILLED_IN = re.compile(r"%\d*[AaBbJjNnstuXx%]|\\")  # in the name of a log, as %j or %4t
# A container lacks SLURM's commands: training then asks by an exit code to be queued again.
QUEUE_AGAIN = [
    "code=$?",
    f'[ "$code" -ne {AGAIN} ] || scontrol requeue "$SLURM_JOB_ID"',
    'exit "$code"',
]


def require() -> None:
    """Make sure that this machine can queue jobs.

    Raises:
        UserError: it lacks SLURM's commands.
    """
    if not (shutil.which("sbatch") and shutil.which("srun")):
        raise UserError(
            "this machine has no sbatch: submit from a login node of the cluster, or run here with "
            "--cluster local"
        )


def queue(tasks: Sequence[Task], folder: Path, after: list[str]) -> list[str]:
    """Queue a job, or a job array of several tasks; one is to be run again if its node fails.

    Raises:
        UserError: SLURM refuses.
    """
    configs = [task.config for task in tasks]
    require_plain(folder)
    executor = SlurmExecutor(folder, python=configs[0].launcher.python)
    executor.update_parameters(**options(configs, after))
    # sbatch is to know nothing of the job that this process may be in.
    own = {name: None for name in os.environ if OF_A_JOB.fullmatch(name)}
    try:
        # submitit tells a refusal on stderr too
        with contextlib.redirect_stderr(io.StringIO()), changed(own):
            return [job.job_id for job in executor.submit_array(tasks)]
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"SLURM refuses the job: {' '.join(str(error).split())}") from None


def script(configs: Sequence[Config], folder: Path) -> str:
    """The sbatch script that `queue` would hand in."""
    require_plain(folder)
    python = configs[0].launcher.python or shlex.quote(sys.executable)
    command = f"{python} -u -m submitit.core._submit {shlex.quote(str(folder.absolute()))}"
    count = len(configs) if len(configs) > 1 else None
    settings = options(configs, [])
    return _make_sbatch_string(command, folder.absolute(), map_count=count, **settings)


def require_plain(folder: Path) -> None:
    """Refuse a folder for logs in whose name SLURM and submitit would fill something in, or whose
    name is not one line of their script.

    Raises:
        UserError: naming it.
    """
    if found := FILLED_IN.search(str(folder.absolute())):
        raise UserError(
            f"{folder.absolute()}: SLURM puts a job's number or name in place of {found[0]}, and "
            "its log elsewhere: choose a run.output_dir without it"
        )
    if (shown := printable(str(folder.absolute()))) != str(folder.absolute()):
        raise UserError(
            f"{shown} has a line break or another control character: choose a "
            "run.output_dir without it"
        )


def options(configs: Sequence[Config], after: list[str]) -> dict[str, Any]:
    """The `launcher` section of runs, in the words of submitit's SLURM executor.

    Args:
        configs: of a run, or of a sweep's.
        after: jobs that must end first.

    Raises:
        UserError: for a time limit that leaves no time before its warning.
    """
    config = configs[0]
    place = config.launcher
    if place.time * 60 <= place.signal_delay:
        raise UserError(
            f"launcher.time is {place.time * 60} s and launcher.signal_delay {place.signal_delay} "
            "s: the warning comes so long before the limit, so give the limit more time, or the "
            "warning less"
        )
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
        "setup": [*FORGET, f"export {SAFE}=1", *place.setup],
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


def enter() -> None:
    """Training reads its place from SLURM's own variables."""


def states(ids: list[str]) -> dict[str, State]:
    """What became of jobs, from the queue in one question, and of those it forgot from accounts.

    Raises:
        UserError: SLURM does not answer.
    """
    ids = [job for job in ids if NUMBER.fullmatch(job)]
    if not (ids and shutil.which("squeue")):
        return {}
    columns = "--format=%i|%T|%N|%D|%L|%r"
    answer = _run(
        "squeue", "--noheader", "--array", "--states=all", columns, f"--jobs={','.join(ids)}"
    )
    if answer.returncode and "Invalid job id" not in answer.stderr:
        raise UserError(f"squeue does not answer: {' '.join(answer.stderr.split())}")
    found = {}
    for line in answer.stdout.splitlines():
        job, word, hosts, count, left, reason = line.split("|", 5)
        waits = word == "PENDING"  # where a job was before it was requeued says nothing
        nodes = count if waits or not hosts else hosts
        reason = reason if waits and reason != "None" else ""
        found[job] = State(word, nodes, left, reason, word not in OVER)
    forgotten = [job for job in ids if job not in found]
    if forgotten and shutil.which("sacct"):  # fails where the cluster keeps no accounts
        columns = "--format=JobID,State,NodeList"
        jobs = f"--jobs={','.join(forgotten)}"
        answer = _run("sacct", "--noheader", "--parsable2", "--allocations", columns, jobs)
        for line in answer.stdout.splitlines():
            job, words, hosts = line.split("|")
            word = words.split()[0]
            found[job] = State(word, hosts, is_live=word not in OVER)
    return found


def home(job: str) -> Path | None:
    """SLURM gives no number again for long."""
    return None


def cancel(ids: list[str]) -> None:
    """Stop jobs for good; SLURM warns their processes first.

    Raises:
        UserError: SLURM refuses.
    """
    answer = _run("scancel", *ids)
    if answer.returncode:
        raise UserError(" ".join(answer.stderr.split()))


def log(folder: str, job: str, rank: int) -> Path:
    """submitit's file, or that of plain sbatch, which all ranks share."""
    return Path(folder) / f"{job}_{rank}_log.out" if folder else Path(f"slurm-{job}.out")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)
