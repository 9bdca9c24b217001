"""Which process of how many this is, as a launcher or the scheduler says."""

from collections.abc import Mapping
from dataclasses import dataclass

from t5vae.cluster import scheduler
from t5vae.common.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        hosts: where each rank is, as the scheduler calls it; empty under other launchers.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    hosts: tuple[str, ...] = ()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def spans_hosts(self) -> bool:
        return self.local_world_size < self.world_size


def find_ranks(env: dict[str, str]) -> Ranks:
    """Read the environment: a launcher's variables, then the scheduler's, else a single process.

    Raises:
        UserError: where a launcher set only some of its variables.
    """
    launched = "RANK" in env or "WORLD_SIZE" in env
    if not launched and not scheduler.is_in_step(env):
        return Ranks(0, 1, 0, 1, scheduler.LOOPBACK, 0)
    try:
        ranks = _from_launcher(env) if launched else Ranks(**scheduler.place_in_step(env))
        if not 0 <= ranks.rank < ranks.world_size:
            raise ValueError(f"rank {ranks.rank} of {ranks.world_size}")
    except (KeyError, ValueError) as error:
        names = "RANK and WORLD_SIZE" if launched else scheduler.RANK
        raise UserError(
            f"the launcher's environment is incomplete or malformed: {error}; "
            f"unset {names} to run one process"
        ) from None
    return ranks


def ends_together(env: Mapping[str, str]) -> bool:
    """Whether what started this process ends it once another rank has ended badly."""
    others = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")  # DeepSpeed's launcher and torchrun set these
    return scheduler.is_in_step(env) or any(name in env for name in others)


def _from_launcher(env: dict[str, str]) -> Ranks:
    world, address = int(env["WORLD_SIZE"]), env["MASTER_ADDR"]
    local = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE")
    # torchrun's agents have the store that its ranks meet in, perhaps on a host without ranks.
    if local and int(local) == world and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        address = scheduler.LOOPBACK
    return Ranks(
        rank=int(env["RANK"]),
        world_size=world,
        local_rank=int(env["LOCAL_RANK"]),
        local_world_size=int(local or world),
        master_addr=address,
        master_port=int(env["MASTER_PORT"]),
    )
