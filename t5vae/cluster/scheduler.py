"""The scheduler's words: what SLURM tells a process of a job, and what a job asks of it.

What submits jobs and asks for their states is `launcher.slurm`. No other file knows SLURM.
"""

import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

AGAIN = 75  # EX_TEMPFAIL of sysexits.h: slurm/train.sh and the launcher's script then requeue
RANK = "SLURM_PROCID"
TOKEN = "SLURM_JWT"  # which lets whoever has it act for the user
LOOPBACK = "127.0.0.1"  # ranks of one host need no name of it


def is_in_step(env: Mapping[str, str]) -> bool:
    """Whether srun started this process as a task of a step.

    A bare `salloc` or `sbatch` shell has most of these variables too, with nobody else to wait for.
    """
    return RANK in env and env.get("SLURM_STEP_ID", "").isdigit()


def place_in_step(env: Mapping[str, str]) -> dict[str, Any]:
    """This task among those of its step, in the words of `t5vae.cluster.ranks.Ranks`.

    Raises:
        KeyError, ValueError: for a variable that is missing or malformed.
    """
    hosts = expand_hosts(env["SLURM_STEP_NODELIST"])
    tasks = _expand_counts(env["SLURM_STEP_TASKS_PER_NODE"])
    return {
        "rank": int(env[RANK]),
        "world_size": int(env["SLURM_STEP_NUM_TASKS"]),
        "local_rank": int(env["SLURM_LOCALID"]),
        "local_world_size": tasks[0],
        "master_addr": hosts[0] if len(hosts) > 1 else LOOPBACK,
        "master_port": 20_000 + int(env["SLURM_JOB_ID"]) % 20_000,
        "hosts": tuple(host for host, n in zip(hosts, tasks, strict=False) for _ in range(n)),
    }


def is_first_of_host(env: Mapping[str, str]) -> bool:
    """Whether this process speaks for its host: its local rank, a launcher's or srun's, is 0."""
    return env.get("LOCAL_RANK", env.get("SLURM_LOCALID", "0")) == "0"


def expand_hosts(nodelist: str) -> list[str]:
    """SLURM's compressed list in full: `gpu[03-05,9],b1` is gpu03, gpu04, gpu05, gpu9 and b1."""
    found = []
    for group in re.split(r",(?![^\[]*\])", nodelist):
        parts = re.split(r"\[([^\]]*)\]", group)  # text and ranges in turn
        choices = [_expand_range(p) if i % 2 else [p] for i, p in enumerate(parts)]
        found += ["".join(choice) for choice in itertools.product(*choices)]
    return found


def _expand_range(ranges: str) -> list[str]:
    found = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        found += [f"{i:0{len(first)}}" for i in range(int(first), int(last or first) + 1)]
    return found


def _expand_counts(counts: str) -> list[int]:
    """Tasks of each host: `2(x3),1` is 2, 2, 2 and 1."""
    found = []
    for part in counts.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        found += [int(count)] * int(times or 1)
    return found


def host_name() -> str:
    """This host, as SLURM calls it where it does."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def job_id() -> str | None:
    """The SLURM job that this process belongs to; ARRAY_TASK in an array."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def requeue_job() -> bool:
    """Ask SLURM to run this job again.

    Returns:
        False outside a job, where SLURM's commands are missing, as in a container, or where SLURM
        refuses, which is told.
    """
    job = job_id()
    if job is None or shutil.which("scontrol") is None:
        return False
    answer = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if answer.returncode:
        reason = " ".join(answer.stderr.split())
        print(f"job {job} is not queued again: {reason}", file=sys.stderr)
    return answer.returncode == 0


def queue_again() -> None:
    """Ask SLURM to run this job again, or end this process with the code that asks its script to.

    Raises:
        SystemExit: with `AGAIN`, in a job whose container lacks SLURM's commands.
    """
    if job_id() and not requeue_job():
        sys.exit(AGAIN)


def is_running(job: str) -> bool:
    """Whether the scheduler runs a job now; False where it cannot be asked."""
    states = "--states=RUNNING,SUSPENDED,COMPLETING"
    command = ["squeue", "--noheader", states, f"--jobs={job}"]
    try:
        return bool(subprocess.run(command, capture_output=True, timeout=60).stdout.strip())
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False


def about_cluster() -> str:
    """For people: SLURM's release, and its partitions, as far as this machine can ask."""
    if not shutil.which("sbatch"):
        return "none: this machine has no sbatch"
    release = _answer("sbatch", "--version")
    partitions = _answer("sinfo", "--noheader", "--format=%P of %D nodes with %c cores and %G")
    return "; ".join([release, *partitions.splitlines()])


def _answer(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired):
        return f"{command[0]} does not answer"
    if done.returncode:
        return f"{command[0]} fails: {(done.stderr.strip().splitlines() or ['without a word'])[0]}"
    return done.stdout.strip()
