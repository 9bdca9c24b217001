"""Which process of how many this is, and the process group they form."""

import itertools
import os
import re
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from shards.errors import UserError
from t5vae.training.allocator import keep_freed_memory


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        hosts: where each rank is, as SLURM calls it; empty under other launchers.
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
    """Read the environment: a launcher's variables, then srun's, else a single process.

    SLURM's variables count only inside a step of srun: a bare `salloc` or `sbatch` shell has them
    too, with nobody else to wait for.

    Raises:
        UserError: where a launcher set only some of its variables.
    """
    launched = "RANK" in env or "WORLD_SIZE" in env
    if not launched and not ("SLURM_PROCID" in env and env.get("SLURM_STEP_ID", "").isdigit()):
        return Ranks(0, 1, 0, 1, "127.0.0.1", 0)
    try:
        ranks = _from_launcher(env) if launched else _from_srun(env)
        if not 0 <= ranks.rank < ranks.world_size:
            raise ValueError(f"rank {ranks.rank} of {ranks.world_size}")
    except (KeyError, ValueError) as error:
        names = "RANK and WORLD_SIZE" if launched else "SLURM_PROCID"
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


def _from_srun(env: dict[str, str]) -> Ranks:
    hosts = expand_hosts(env["SLURM_STEP_NODELIST"])
    tasks = _expand_counts(env["SLURM_STEP_TASKS_PER_NODE"])
    return Ranks(
        rank=int(env["SLURM_PROCID"]),
        world_size=int(env["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(env["SLURM_LOCALID"]),
        local_world_size=tasks[0],
        master_addr=hosts[0],
        master_port=20_000 + int(env["SLURM_JOB_ID"]) % 20_000,
        hosts=tuple(host for host, n in zip(hosts, tasks, strict=False) for _ in range(n)),
    )


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


def network_interface(ranks: Ranks) -> str | None:
    """The interface that leads to another host of the run; None where that cannot be told."""
    own = ranks.hosts[ranks.rank] if ranks.hosts else None
    others = [host for host in (ranks.master_addr, *ranks.hosts) if host != own]
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((others[0], 9))  # sends nothing: the kernel chooses a way
            address = probe.getsockname()[0]
    except (OSError, IndexError):
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if address in (entry.address for entry in addresses) and not address.startswith("127."):
            return name
    return None


def start_process_group(
    ranks: Ranks, timeout: float = 600, *, compiles: bool = False, interface: str | None = None
) -> torch.device:
    """Join the process group through DeepSpeed and choose this rank's device.

    Args:
        ranks: which process this is.
        timeout: seconds after which a collective that others do not join ends the process.
        compiles: leave torch.compile on where there is no accelerator.
        interface: network interface to talk over; by default the one to the other hosts.

    Returns:
        The accelerator of this local rank, or the CPU (over gloo) where there is none.

    Raises:
        UserError: on rank 0, where the port to meet at is taken.
    """
    accelerated = torch.accelerator.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if not accelerated:
        os.environ["DS_ACCELERATOR"] = "cpu"
        keep_freed_memory()
        if not compiles:
            # DeepSpeed compiles Muon's kernels: on a CPU that takes longer than it saves.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        if "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // ranks.local_world_size))
    if interface:
        # "=" is NCCL's way to take the name as a whole, not as the beginning of one
        os.environ.update(GLOO_SOCKET_IFNAME=interface, NCCL_SOCKET_IFNAME=f"={interface}")
    elif ranks.spans_hosts and (found := network_interface(ranks)):
        # gloo takes the address of this host's name, which on many systems is a loopback.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", found)
    os.environ.update(
        RANK=str(ranks.rank),
        WORLD_SIZE=str(ranks.world_size),
        LOCAL_RANK=str(device_index(ranks.local_rank) if accelerated else ranks.local_rank),
        MASTER_ADDR=ranks.master_addr,
        MASTER_PORT=str(ranks.master_port or free_port()),
    )
    import deepspeed

    # DeepSpeed would compile this when it starts on a CPU; it serves inference alone.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if accelerated:
        torch.accelerator.set_device_index(device_index(ranks.local_rank))
    try:
        deepspeed.init_distributed(
            dist_backend=None if accelerated else "gloo",
            auto_mpi_discovery=False,
            timeout=timedelta(seconds=timeout),
            verbose=False,
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {os.environ['MASTER_PORT']} of this host is taken, perhaps by another run: "
            "choose another, as with `deepspeed --master_port 29501`"
        ) from None
    if not accelerated:
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    return torch.device(kind.type, device_index(ranks.local_rank))


def device_index(local_rank: int) -> int:
    """This rank's device among those that it sees; where SLURM shows each task its own, the one."""
    return local_rank % torch.accelerator.device_count()


def limit_waiting(timeout: float) -> None:
    """Give every process group this timeout in seconds; DeepSpeed makes some of 30 minutes."""
    for group in _groups():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)


def _groups() -> list[dist.ProcessGroup]:
    return list(dist.distributed_c10d._world.pg_map)


def leave_process_group() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def lost_ranks(ranks: Ranks, patience: float = 10) -> list[int]:
    """After a collective failed: which ranks do not answer any more.

    Every rank that is alive says so in the store that the group met in, and leaves the group, at
    which the others' collectives fail too.

    Args:
        patience: seconds to wait for an answer.
    """
    store = dist.distributed_c10d._get_default_store()
    everyone = set(range(ranks.world_size))
    alive = {ranks.rank}
    try:
        store.set(f"alive/{ranks.rank}", "")
        for group in _groups():
            group.abort()
        end = time.monotonic() + patience
        while alive < everyone and time.monotonic() < end:
            alive |= {rank for rank in everyone - alive if store.check([f"alive/{rank}"])}
            time.sleep(0.1)
        if ranks.is_first:
            time.sleep(1)  # the store is in this process: let the others look
    except RuntimeError:
        return [0]  # whose process has the store
    return sorted(everyone - alive)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def host_name() -> str:
    """This host, as SLURM calls it where it does."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def process_seconds() -> float:
    """Since this process began, imports included."""
    return max(0.0, time.time() - psutil.Process().create_time())


def raise_together(problem: UserError | None) -> None:
    """Raise on all ranks what any rank has to complain of; all ranks call it.

    Raises:
        UserError: the first rank's that has one, with its host where others have none.
    """
    found: list[tuple[str, str | None]] = [("", None)] * dist.get_world_size()
    dist.all_gather_object(found, (host_name(), None if problem is None else str(problem)))
    broken = {host: text for host, text in reversed(found) if text is not None}
    if broken:
        host, text = next(reversed(broken.items()))
        raise UserError(text if {host for host, _ in found} == set(broken) else f"{host}: {text}")


def check_shared(file: Path) -> None:
    """Refuse a file system that not all ranks share; all of them call it.

    Args:
        file: that rank 0 has just written, with content like no other.

    Raises:
        UserError: on all ranks, naming those that do not find it.
    """
    try:
        found = file.read_text()
    except OSError:
        found = None
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    elsewhere = [str(rank) for rank, own in enumerate(everyone) if own != everyone[0]]
    if elsewhere:
        raise UserError(
            f"rank {', '.join(elsewhere)} of {len(everyone)} does not find what rank 0 wrote in "
            f"{file.parent}: set run.output_dir to a folder that all hosts share"
        )


def all_sum(*values: float, device: torch.device) -> list[float]:
    """Sum each value over the ranks, in fp64."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def all_max(*values: float, device: torch.device) -> list[float]:
    """The largest of each value over the ranks, in fp64; a process without a group has its own."""
    if not dist.is_initialized():
        return list(values)
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


def from_first(value: Any) -> Any:
    """Rank 0's value, on all ranks."""
    found = [value]
    dist.broadcast_object_list(found, src=0)
    return found[0]
