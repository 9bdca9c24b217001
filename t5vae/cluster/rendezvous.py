"""Where ranks meet: a store that rank 0's process has, or the agent of torchrun."""

import contextlib
import os
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from t5vae.cluster.descriptors import allow_files, files_of, too_few_files
from t5vae.cluster.errors import UnhealthyError
from t5vae.cluster.ranks import Ranks
from t5vae.cluster.scheduler import host_name
from t5vae.common.errors import UserError
from t5vae.common.quiet import quiet_start


def meet(ranks: Ranks, folder: Path, patience: float) -> tuple[dist.Store, dist.Store]:
    """Join the store of a run's ranks.

    Args:
        ranks: which process this is, of several.
        folder: the run's.
        patience: seconds to wait for rank 0.

    Returns:
        The store, and the same over a connection of its own, for another thread: a call that waits
        holds its connection.

    Raises:
        UserError: where another run has the port, or the host does not let rank 0 have as many
            connections as the ranks need.
        UnhealthyError: rank 0 does not come.
    """
    held = is_agents()
    allow_files(wanted := files_wanted(ranks))
    if ranks.is_first and (problem := too_few_files(wanted)):
        raise UserError(f"{host_name()}: {problem}")
    try:
        with quiet_start(Path(os.devnull)):  # the store wants names for addresses
            store = dist.TCPStore(
                ranks.master_addr,
                ranks.master_port,
                ranks.world_size,
                is_master=ranks.is_first and not held,
                timeout=timedelta(seconds=patience),
                wait_for_workers=False,
                multi_tenant=True,
            )
            own = store.clone()
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise absent_first(ranks) from error
        raise _taken(ranks) from None
    except dist.DistError as error:
        raise absent_first(ranks) from error
    prefix = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{folder.absolute()}"
    store, own = dist.PrefixStore(prefix, store), dist.PrefixStore(prefix, own)
    if store.add(f"joined/{ranks.rank}", 1) > 1:  # that of the same run, which was started before
        raise _taken(ranks)
    return store, own


def missing(store: dist.Store, keys: list[str], seconds: float) -> list[int]:
    """The places of the keys that nobody has set after so long.

    The store is asked once where all are there, and otherwise by halves, for which a few that are
    not take a few questions each.
    """
    with contextlib.suppress(dist.DistStoreError):
        store.wait(keys, timedelta(seconds=seconds))
        return []
    return _absent(store, keys, 0)


def _absent(store: dist.Store, keys: list[str], first: int) -> list[int]:
    if store.check(keys):
        return []
    if len(keys) == 1:
        return [first]
    half = len(keys) // 2
    return _absent(store, keys[:half], first) + _absent(store, keys[half:], first + half)


def files_wanted(ranks: Ranks) -> int:
    """Open files that this rank may need."""
    return files_of(ranks.world_size, has_store=ranks.is_first and not is_agents())


def is_agents() -> bool:
    """Whether torchrun's agent holds the store of its ranks; otherwise rank 0 does, and the process
    group meets in the same one.
    """
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _taken(ranks: Ranks) -> UserError:
    return UserError(
        f"port {ranks.master_port} of rank 0's host is taken, perhaps by another run: choose "
        "another, as with `deepspeed --master_port 29501`"
    )


def absent_first(ranks: Ranks) -> UnhealthyError:
    """What to raise where rank 0 does not answer."""
    name = ranks.hosts[0] if ranks.hosts else ranks.master_addr
    others = (rank for rank, host in enumerate(ranks.hosts) if host != name)
    return UnhealthyError(
        f"rank 0 on {name} does not answer",
        [name],
        is_first_healthy=next(others, None) == ranks.rank,
        weather=False,
    )
