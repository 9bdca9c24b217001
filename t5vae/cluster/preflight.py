"""Before training: every rank tells how its host is, so that a broken one is named.

Ranks meet in a store of rank 0, since a host whose device or shards are missing cannot join a
process group.
"""

import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from t5vae.cluster.agreement import all_sum
from t5vae.cluster.errors import UnhealthyError
from t5vae.cluster.process_group import device_index
from t5vae.cluster.ranks import Ranks
from t5vae.cluster.scheduler import host_name
from t5vae.common.errors import UserError
from t5vae.common.files import SCRATCH, write_whole
from t5vae.common.quiet import quiet_start

HEALTH = "health.json"
PAYLOAD = 4 * 2**20  # fp32 numbers in the timed all-reduce: 16 MiB
LEAVE = 10  # seconds that rank 0 stays so that all can read its verdict


class Preflight:
    """Runs the checks inside on all ranks of several hosts, and raises on all what any has found.

    On a single host nothing needs to be told, and nothing is done.

    Args:
        ranks: which process this is.
        folder: the run's.
        patience: seconds that ranks wait for each other.

    Attributes:
        rows: what each rank told, on rank 0: rank, host, device, free bytes of the run's and of the
            temporary folder, seconds that the checks took, and the problem if there is one.
    """

    def __init__(self, ranks: Ranks, folder: Path, patience: float):
        self.ranks = ranks
        self.folder = folder
        self.patience = patience
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> "Preflight":
        self.began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Meet the others.

        Raises:
            UserError: what all ranks have to complain of.
            UnhealthyError: on all ranks, where a part has, or has not come.
        """
        fault = error is not None and not isinstance(error, UserError)
        if fault or not self.ranks.spans_hosts:
            return
        row = self._row(str(error) if error else None)
        try:
            with quiet_start(Path(os.devnull)):  # the store wants names for addresses
                verdict = self._tell(row)
        except dist.DistError as lost:
            name = self.ranks.hosts[0] if self.ranks.hosts else self.ranks.master_addr
            raise self._unhealthy(f"rank 0 on {name} does not answer", [name]) from lost
        if verdict["hosts"]:
            raise self._unhealthy(verdict["problem"], verdict["hosts"]) from None
        if verdict["problem"] and error is None:
            raise UserError(verdict["problem"])

    def _unhealthy(self, text: str, hosts: list[str]) -> UnhealthyError:
        healthy = (rank for rank, host in enumerate(self.ranks.hosts) if host not in hosts)
        is_first = next(healthy, None) == self.ranks.rank
        return UnhealthyError(text, hosts, is_first_healthy=is_first)

    def _row(self, problem: str | None) -> dict[str, Any]:
        scratch = shutil.disk_usage(temporary := tempfile.gettempdir()).free
        if scratch < SCRATCH:
            problem = problem or f"{temporary} has {scratch / 2**20:.0f} MiB free"
        nearest = self.folder.absolute()
        while not nearest.exists():
            nearest = nearest.parent
        return {
            "rank": self.ranks.rank,
            "host": self.ranks.hosts[self.ranks.rank] if self.ranks.hosts else host_name(),
            "device": device_name(self.ranks.local_rank),
            "free": shutil.disk_usage(nearest).free,
            "free_scratch": scratch,
            "seconds": round(time.perf_counter() - self.began, 3),
            "problem": problem,
        }

    def _tell(self, row: dict[str, Any]) -> dict[str, Any]:
        ranks, patience = self.ranks, self.patience
        # torchrun's agent holds the store of its ranks; otherwise rank 0 does, and the process
        # group will meet in the same one.
        held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.store = dist.TCPStore(
            ranks.master_addr,
            ranks.master_port,
            ranks.world_size,
            is_master=ranks.is_first and not held,
            timeout=timedelta(seconds=patience + LEAVE),
            wait_for_workers=False,
            multi_tenant=True,
        )
        turn = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"meeting/{turn}", self.store)
        store.set(str(ranks.rank), json.dumps(row))
        if ranks.is_first:
            verdict = self._judge(store, patience)
            store.set("verdict", json.dumps(verdict))
        store.wait(["verdict"])
        verdict = json.loads(store.get("verdict"))
        read = store.add("read", 1)
        end = time.monotonic() + LEAVE
        while ranks.is_first and read < len(self.rows) and time.monotonic() < end:
            time.sleep(0.02)
            read = store.add("read", 0)
        return verdict

    def _judge(self, store: dist.Store, patience: float) -> dict[str, Any]:
        """Wait for all ranks; then what is wrong, and the hosts where it is if not everywhere."""
        everyone = [str(rank) for rank in range(self.ranks.world_size)]
        with contextlib.suppress(dist.DistStoreError):
            store.wait(everyone, timedelta(seconds=patience))
        here = [rank for rank in everyone if store.check([rank])]
        missing = [int(rank) for rank in everyone if rank not in here]
        self.rows = [json.loads(row) for row in store.multi_get(here)]
        if missing:
            hosts = [self.ranks.hosts[r] if self.ranks.hosts else f"of rank {r}" for r in missing]
            return _verdict({host: f"did not come within {patience:g} s" for host in hosts})
        devices = {row["device"] for row in self.rows}
        problems = {row["host"]: row["problem"] for row in self.rows if row["problem"]}
        if devices != {"cpu"}:
            without = "has no accelerator, which others have"
            problems |= {row["host"]: without for row in self.rows if row["device"] == "cpu"}
        if {row["host"] for row in self.rows} <= set(problems):
            return {"problem": self.rows[0]["problem"], "hosts": []}
        return _verdict(problems)

    def report(self, device: torch.device) -> str | None:
        """Time an all-reduce, and write health.json; all ranks call it, in the process group.

        Returns:
            One line for people; None on a single host.
        """
        if not self.ranks.spans_hosts:
            return None
        numbers = torch.ones(PAYLOAD, device=device)
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            dist.all_reduce(numbers)
            numbers.view(-1)[0].item()  # waits for an accelerator
            times.append(time.perf_counter() - begin)
        own = statistics.median(times[1:])
        seconds = all_sum(own, device=device)[0] / self.ranks.world_size
        if self.ranks.is_first:
            told = json.dumps({"all_reduce": seconds, "ranks": self.rows}, indent=1)
            write_whole(self.folder / HEALTH, told + "\n")
        hosts = sorted({row["host"] for row in self.rows})
        return (
            f"{self.ranks.world_size} ranks on {len(hosts)} hosts ({', '.join(hosts)}); an "
            f"all-reduce of 16 MiB takes {seconds * 1000:,.1f} ms"
        )


def _verdict(problems: dict[str, str]) -> dict[str, Any]:
    text = "; ".join(f"{host}: {problem}" for host, problem in sorted(problems.items()))
    return {"problem": text, "hosts": sorted(problems)}


def device_name(local_rank: int) -> str:
    """The accelerator of this rank, or cpu."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.accelerator.is_available():
        return "cpu"
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(device_index(local_rank))
    return str(torch.accelerator.current_accelerator())
