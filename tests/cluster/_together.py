"""Ranks that meet and fail, without a model: `python _together.py` forks those it is asked for.

Each line of its input is a request: {world, timeout, folder, does: {RANK: what, "others": what}}; a
line of output answers it: {codes, seconds, outputs}. What a rank does is a name of `DOES`.
"""

import errno
import gc
import json
import os
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from t5vae.cluster import together as module
from t5vae.cluster.agreement import all_sum, start_bookkeeping
from t5vae.cluster.errors import SharedError
from t5vae.cluster.phases import begin_step, phase
from t5vae.cluster.process_group import free_port
from t5vae.cluster.ranks import Ranks
from t5vae.cluster.stopping import StopRequest
from t5vae.cluster.together import Together
from t5vae.common.errors import StorageError, UserError
from t5vae.training.main import exit_code_of

module.GRACE = 0.5
HOSTS = ("node1", "node1", "node2", "node2")


def raise_(error: BaseException) -> None:
    raise error


def collective() -> None:
    """As gloo's, and NCCL's where its watchdog is off: nothing of Python runs until it is over."""
    dist.all_reduce(torch.ones(1))


def device() -> None:
    """What never comes back and hears of nothing, as a device that waits for lost ranks."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    signal.sigwait([signal.SIGUSR1])


def hangs() -> None:
    """As on a disk that does not answer, while the process lives."""
    with phase("data"):
        time.sleep(600)


def in_a_phase() -> None:
    begin_step(12)
    with phase("data"):
        raise UserError("no such shard")


def soon_after(act, seconds: float = 0.3):
    def later():
        time.sleep(seconds)
        act()

    return later


DOES = {
    "nothing": lambda: None,
    "is slow": lambda: time.sleep(1),
    "collective": collective,
    "bookkeeping": lambda: all_sum(1),
    "device": device,
    "python": lambda: [time.sleep(0.01) for _ in range(60_000)],
    "hangs": hangs,
    "refuses": soon_after(in_a_phase),
    "refuses too": soon_after(lambda: raise_(UserError("no such file"))),
    "all refuse": lambda: raise_(SharedError("the losses are not finite")),
    "storage": soon_after(lambda: raise_(StorageError("train-0.tar, block 3: the storage fails"))),
    "weather": soon_after(lambda: raise_(OSError(errno.ESTALE, "Stale file handle", "m.jsonl"))),
    "disk is full": soon_after(lambda: raise_(OSError(errno.ENOSPC, "No space left", "m.jsonl"))),
    "may not write": soon_after(lambda: raise_(OSError(errno.EACCES, "Permission denied", "m"))),
    "has a bug": soon_after(lambda: {}["missing"]),
    "is out of memory": soon_after(lambda: raise_(torch.OutOfMemoryError("CUDA out of memory"))),
    "is interrupted": soon_after(lambda: sys.exit(130)),
    "dies": soon_after(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "is stopped": soon_after(lambda: os.kill(os.getpid(), signal.SIGSTOP)),
}


def be_rank(rank: int, port: int, request: dict) -> int:
    """One rank, two to a host; its exit code."""
    world, folder = request["world"], Path(request["folder"])
    ranks = Ranks(rank, world, rank % 2, min(2, world), "127.0.0.1", port, HOSTS[:world])
    does = request["does"].get(str(rank), request["does"].get("others"))
    module.queue_again = lambda: (folder / "queued").write_text(str(rank))
    stop = StopRequest()
    stop.install()

    def work() -> None:
        with Together(ranks, folder, request["timeout"], stop.lets_requeue) as together:
            if does == "decides":
                value = together.from_first(lambda: {"rank": rank, "finished": True})
                print(json.dumps(value), flush=True)
                together.from_first(lambda: raise_(UserError("another run")))
            limit = timedelta(seconds=request["timeout"])
            store = dist.PrefixStore("group", together.store)
            dist.init_process_group("gloo", timeout=limit, store=store, rank=rank, world_size=world)
            start_bookkeeping(request["timeout"])
            collective()
            DOES[does]()
            dist.destroy_process_group()

    return exit_code_of(work)


def hold_store(port: int) -> int:
    """A process that holds the store that ranks meet in, as torchrun's agent does."""
    ready, is_ready = os.pipe()
    pid = os.fork()
    if not pid:
        _store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        os.write(is_ready, b".")
        signal.pause()
    os.read(ready, 1)
    return pid


def answer(request: dict) -> dict:
    port, began = free_port(), time.monotonic()
    agent = hold_store(port) if request["agent"] else None
    outputs = [tempfile.TemporaryFile() for _ in range(request["world"])]  # noqa: SIM115
    pids = []
    for rank, output in enumerate(outputs):
        pids.append(os.fork())
        if not pids[-1]:
            os.setsid()
            for descriptor in (1, 2):
                os.dup2(output.fileno(), descriptor)
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(request["agent"])
            sys.exit(be_rank(rank, port, request))
    if agent:
        time.sleep(2)
        os.kill(agent, signal.SIGKILL)
        os.waitpid(agent, 0)
    codes: dict[int, int] = {}
    ends = began + 60
    stopped = {int(r) for r, what in request["does"].items() if what == "is stopped"}
    while len(codes) < len(pids) - len(stopped) and time.monotonic() < ends:
        for rank, pid in enumerate(pids):
            if rank not in codes:
                codes |= _ended(rank, pid)
        if any(codes.values()):
            _end_the_rest(pids, codes)
        time.sleep(0.01)
    took = time.monotonic() - began
    for rank, pid in enumerate(pids):
        if rank not in codes:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    told = []
    for output in outputs:
        output.seek(0)
        told.append(output.read().decode())
    return {
        "codes": [codes.get(r) for r in range(len(pids))],
        "seconds": took,
        "outputs": told,
    }


def _end_the_rest(pids: list[int], codes: dict[int, int]) -> None:
    """As srun does where a task has ended badly, and DeepSpeed's launcher."""
    for rank, pid in enumerate(pids):
        if rank not in codes:
            os.kill(pid, signal.SIGTERM)


def _ended(rank: int, pid: int) -> dict[int, int]:
    found, status = os.waitpid(pid, os.WNOHANG)
    return {rank: os.waitstatus_to_exitcode(status)} if found else {}


if __name__ == "__main__":
    gc.freeze()  # or the end of a rank would copy every page
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
