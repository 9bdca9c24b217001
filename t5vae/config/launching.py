"""The section that says what a cluster is asked for."""

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from t5vae.common.section import Line, Section


def minutes(time: Any) -> Any:
    """SLURM's ways to write a time, such as 90, 1:30:00 or 2-12, in minutes, rounded up.

    Raises:
        ValueError: for text that is none of them.
    """
    if not isinstance(time, str):
        return time
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not found:
        raise ValueError("write minutes, hours:minutes:seconds, or days-hours")
    days, *rest = found.groups()
    given = [int(part) for part in rest if part is not None]
    if days is None and len(given) < 3:  # minutes[:seconds]
        given = [0, *given]
    hours, mins, secs = given + [0] * (3 - len(given))
    return int(days or 0) * 1440 + hours * 60 + mins + math.ceil(secs / 60)


class Launcher(Section):
    """What `t5vae-launch submit` asks SLURM for."""

    nodes: int = Field(default=1, ge=1)
    """Hosts."""
    gpus_per_node: int = Field(default=0, ge=0)
    """One rank a GPU; 0 for one rank a node, on CPU."""
    cpus_per_task: int = Field(default=1, ge=1)
    """Cores of one rank."""
    time: Annotated[int, BeforeValidator(minutes), Field(ge=1)] = 60
    """Time limit in minutes, or as SLURM writes it: 24:00:00, 2-12. The job then goes on in a new
    turn."""
    partition: Line | None = None
    """Queue to submit to; null for the cluster's default."""
    account: Line | None = None
    """Account to charge."""
    qos: Line | None = None
    """Quality of service."""
    constraint: Line | None = None
    """Features that nodes must have."""
    exclude: Line | None = None
    """Hosts to leave out."""
    gres: Line | None = None
    """Generic resources of a node, where GPUs are asked for that way: gpu:a100:8."""
    mem: Line | None = None
    """Memory of a node: 64G; 0 for all of it."""
    mail_user: Line | None = None
    """Where SLURM writes to."""
    mail_type: Line | None = None
    """When to write to mail_user: BEGIN, END, FAIL, REQUEUE, ALL."""
    array_parallelism: int | None = Field(default=None, ge=1)
    """How many runs of a sweep train at once; null for all."""
    slurm: dict[Line, Line | int | bool] | None = None
    """Any other option of sbatch, by its long name: {reservation: friday, exclusive: true}."""
    srun_args: list[str] = Field(default=[])
    """Options of srun, such as a container's: [--container-image=t5vae.sqsh]."""
    setup: list[str] = Field(default=[])
    """Lines of shell before training, on the first node: [module load cuda]."""
    python: Line | None = None
    """Command in place of this environment's python: apptainer exec --nv t5vae.sif python."""
    interface: Line | None = None
    """Network interface that ranks talk over; null takes the one that leads to the other hosts."""
    signal_delay: int = Field(default=120, ge=1)
    """Seconds before the time limit at which SLURM warns the job, so that it saves."""
    max_restarts: int = Field(default=3, ge=0)
    """Restarts in a row of one job, without a new checkpoint, before it gives up."""
    exclude_unhealthy: bool = False
    """Queue the run again without the nodes that fail the check before training."""
