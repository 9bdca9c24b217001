"""The process groups: one of tensors, one of bookkeeping; joined, limited in patience, and left."""

import os
import socket
import time
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from t5vae.cluster.agreement import start_bookkeeping
from t5vae.cluster.allocator import keep_freed_memory
from t5vae.cluster.ranks import Ranks
from t5vae.cluster.scheduler import host_name
from t5vae.common.cpus import cpus
from t5vae.common.errors import UserError

RESOLVER = "timeout:1 attempts:2"  # of a name server that does not answer; 5 s are the default
RESOLVING = 10  # seconds in which a name server that fails is asked again
LONGER = 60  # seconds that tensors of an accelerator are waited for beyond those of the CPU


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


def require_address(ranks: Ranks) -> None:
    """Refuse a name of the first host that leads nowhere; ranks would wait for each other in vain.

    The first look-up of a process settles how long it waits for name servers, which torch's store
    asks for names of addresses in the only thread that it has.

    Raises:
        UserError: naming both hosts.
    """
    os.environ.setdefault("RES_OPTIONS", RESOLVER)
    end = time.monotonic() + RESOLVING
    while True:
        try:
            socket.getaddrinfo(ranks.master_addr, ranks.master_port)
            return
        except (OSError, UnicodeError) as error:
            again = isinstance(error, OSError) and error.errno == socket.EAI_AGAIN
            if again and time.monotonic() < end:
                time.sleep(0.1)
                continue
            raise UserError(
                f"{host_name()} finds no address for {ranks.master_addr}, where rank 0 is "
                f"({error}): have the name put into DNS or every host's /etc/hosts, or "
                "train on hosts that find each other"
            ) from None


def start_process_group(
    ranks: Ranks, timeout: float = 600, *, compiles: bool = False, interface: str | None = None
) -> torch.device:
    """Join the process groups, DeepSpeed's too, unless they are, and choose this rank's device.

    The default group is of tensors on that device alone, over gloo on a CPU and over its own
    library (NCCL) on an accelerator, like those that DeepSpeed makes: were it gloo's as well, so
    would they be, and each of gloo's connects all pairs of ranks. Bookkeeping has its own, of
    gloo's: see `agreement`.

    Args:
        ranks: which process this is.
        timeout: seconds after which a collective that others do not join ends the process; those
            of an accelerator wait for `LONGER` more.
        compiles: leave torch.compile on where there is no accelerator.
        interface: network interface to talk over; by default the one to the other hosts.

    Returns:
        The accelerator of this local rank, or the CPU where there is none.
    """
    accelerated = torch.accelerator.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if not accelerated:
        os.environ["DS_ACCELERATOR"] = "cpu"
        keep_freed_memory()
        if not compiles:
            # DeepSpeed compiles Muon's kernels: on a CPU that takes longer than it saves.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, cpus() // ranks.local_world_size))
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
        MASTER_PORT=str(ranks.master_port if ranks.world_size > 1 else free_port()),
    )
    if ranks.world_size == 1:
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # torchrun's has another port
    import deepspeed

    # DeepSpeed would compile this when it starts on a CPU; it serves inference alone.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device, backend, limit = torch.device("cpu"), "gloo", timedelta(seconds=timeout)
    if accelerated:
        kind = torch.accelerator.current_accelerator().type
        device = torch.device(kind, device_index(ranks.local_rank))
        torch.accelerator.set_device_index(device.index)
        backend = dist.get_default_backend_for_device(kind)
        # The end of gloo's waiting can be told; that of NCCL's is its watchdog's, which aborts.
        limit += timedelta(seconds=LONGER)
    # Those that DeepSpeed makes would wait for half an hour.
    dist.distributed_c10d.default_pg_timeout = limit
    dist.distributed_c10d.default_pg_nccl_timeout = limit
    if not dist.is_initialized():
        # DeepSpeed would have NCCL connect first, which waits for a lost rank for ever.
        dist.init_process_group(backend, timeout=limit)
        start_bookkeeping(timeout)
        dist.all_reduce(torch.zeros(1, device=device))  # so NCCL knows the device of its barriers
        deepspeed.init_distributed(verbose=False)
    return device


def device_index(local_rank: int) -> int:
    """This rank's device among those that it sees; the one, where each task is shown its own."""
    return local_rank % torch.accelerator.device_count()


def leave_process_group() -> None:
    """End all process groups, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
