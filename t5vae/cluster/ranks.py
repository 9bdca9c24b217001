"""Which process of how many this is, as a launcher or the scheduler says."""

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
        return Ranks(0, 1, 0, 1, "127.0.0.1", 0)
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


def _from_launcher(env: dict[str, str]) -> Ranks:
    world = int(env["WORLD_SIZE"])
    return Ranks(
        rank=int(env["RANK"]),
        world_size=world,
        local_rank=int(env["LOCAL_RANK"]),
        local_world_size=int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world),
        master_addr=env["MASTER_ADDR"],
        master_port=int(env["MASTER_PORT"]),
    )
