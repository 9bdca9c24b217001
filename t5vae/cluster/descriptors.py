"""Open files: each connection of a rank is one, and a process may have 1,024 on most systems."""

import resource
from contextlib import suppress

IN_STORE = 3  # connections of each rank to the store: two of its own, one of the process group's
GROUPS = 3  # of gloo on a CPU, each of which connects each rank to each other; one beside NCCL
OTHERS = 512  # what else a process opens: shards, logs, libraries, an accelerator's driver


def files_of(world_size: int, *, has_store: bool) -> int:
    """Open files that a process of so many ranks may need; one of them has the store."""
    return (GROUPS + (IN_STORE if has_store else 0)) * world_size + OTHERS


def allow_files(wanted: int) -> None:
    """Let this process have so many open files, or as many as its host allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if not _holds(soft, wanted):
        most = wanted if _holds(hard, wanted) else hard
        with suppress(ValueError, OSError):  # a system's own limit below the one it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def too_few_files(wanted: int) -> str | None:
    """What to say of a host that does not let this process have so many open files."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if _holds(soft, wanted):
        return None
    return (
        f"a process may have {soft:,} open files here, and needs {wanted:,} to reach all ranks: "
        "raise the hard limit (ulimit -Hn, or LimitNOFILE of the scheduler's service)"
    )


def _holds(limit: int, wanted: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= wanted
