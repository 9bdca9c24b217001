"""Before training: every rank tells how its host is, so that a broken one is named.

Ranks meet in a store of rank 0, since a host whose device or shards are missing cannot join a
process group.
"""

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
from t5vae.cluster.descriptors import too_few_files
from t5vae.cluster.errors import SharedError, SharedStorageError, UnhealthyError
from t5vae.cluster.process_group import device_index
from t5vae.cluster.ranks import Ranks
from t5vae.cluster.rendezvous import files_wanted, missing
from t5vae.cluster.scheduler import host_name
from t5vae.common.errors import StorageError, UserError
from t5vae.common.files import SCRATCH, write_whole

HEALTH = "health.json"
PAYLOAD = 4 * 2**20  # fp32 numbers in the timed all-reduce: 16 MiB
LATER = 10  # seconds that the first rank's verdict may come after its patience


class Preflight:
    """Runs the checks inside on all ranks, and raises on all what any has found.

    Args:
        ranks: which process this is.
        folder: the run's.
        patience: seconds that ranks wait for each other.
        store: that they met in; None for a process alone, which tells nobody.

    Attributes:
        rows: what each rank told, on rank 0: rank, host, device, free bytes of the run's and of the
            temporary folder, seconds that the checks took, and the problem if there is one, and
            whether that is its storage's.
    """

    def __init__(self, ranks: Ranks, folder: Path, patience: float, store: dist.Store | None):
        self.ranks, self.folder, self.patience = ranks, folder, patience
        self.store = store and dist.PrefixStore("preflight", store)
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> "Preflight":
        self.began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Meet the others.

        Raises:
            SharedError, SharedStorageError: what all hosts have to complain of.
            UnhealthyError: on all ranks, where some hosts have, or have not come.
        """
        fault = error is not None and not isinstance(error, UserError | StorageError)
        if fault or self.store is None:
            return
        verdict = self._tell(self.store, self._row(error))
        problem, hosts, weather = verdict["problem"], verdict["hosts"], verdict["weather"]
        if hosts:
            healthy = (rank for rank, host in enumerate(self.ranks.hosts) if host not in hosts)
            is_first = next(healthy, None) == self.ranks.rank
            raise UnhealthyError(
                problem, hosts, is_first_healthy=is_first, weather=weather
            ) from None
        if problem:
            raise (SharedStorageError if weather else SharedError)(problem) from None

    def _row(self, error: BaseException | None) -> dict[str, Any]:
        problem = None if error is None else str(error)
        scratch = shutil.disk_usage(temporary := tempfile.gettempdir()).free
        if scratch < SCRATCH:
            problem = problem or f"{temporary} has {scratch / 2**20:.0f} MiB free"
        problem = problem or too_few_files(files_wanted(self.ranks))
        nearest = self.folder.absolute()
        while not nearest.exists():
            nearest = nearest.parent
        return {
            "rank": self.ranks.rank,
            "host": self.ranks.hosts[self.ranks.rank] if self.ranks.hosts else host_name(),
            "device": device_name(self.ranks.local_rank),
            "device_id": device_id(self.ranks.local_rank),
            "free": shutil.disk_usage(nearest).free,
            "free_scratch": scratch,
            "seconds": round(time.perf_counter() - self.began, 3),
            "problem": problem,
            "weather": isinstance(error, StorageError),
        }

    def _tell(self, store: dist.Store, row: dict[str, Any]) -> dict[str, Any]:
        store.set(str(self.ranks.rank), json.dumps(row))
        if self.ranks.is_first:
            store.set("verdict", json.dumps(self._judge(store)))
        store.wait(["verdict"], timedelta(seconds=self.patience + LATER))
        return json.loads(store.get("verdict"))

    def _judge(self, store: dist.Store) -> dict[str, Any]:
        """Wait for all ranks; then what is wrong, and the hosts where it is if not everywhere."""
        everyone = [str(rank) for rank in range(self.ranks.world_size)]
        absent = missing(store, everyone, self.patience)
        here = sorted({*range(self.ranks.world_size)} - {*absent})
        self.rows = [json.loads(row) for row in store.multi_get([everyone[r] for r in here])]
        if absent:
            hosts = [self.ranks.hosts[r] if self.ranks.hosts else f"of rank {r}" for r in absent]
            return _verdict({host: f"did not come within {self.patience:g} s" for host in hosts})
        devices = {row["device"] for row in self.rows}
        found = [row for row in reversed(self.rows) if row["problem"]]
        problems = {row["host"]: row["problem"] for row in found}
        if devices != {"cpu"}:
            without = "has no accelerator, which others have"
            problems |= {row["host"]: without for row in self.rows if row["device"] == "cpu"}
        problems = problems or self._shared_devices()
        weather = bool(found) and all(row["weather"] for row in found)
        if {row["host"] for row in self.rows} <= set(problems):
            first = problems[self.rows[0]["host"]]
            if 0 < len(found) < len(self.rows):
                row = found[-1]
                name = f"rank {row['rank']} of {len(self.rows)} on {row['host']}"
                first = f"{name}: {row['problem']}"
            return {"problem": first, "hosts": [], "weather": weather}
        return _verdict(problems, weather=weather)

    def _shared_devices(self) -> dict[str, str]:
        """Hosts where several ranks have the same accelerator."""
        owners: dict[tuple[str, str], list[int]] = {}
        for row in self.rows:
            if row["device_id"]:
                owners.setdefault((row["host"], row["device_id"]), []).append(row["rank"])
        return {
            host: f"ranks {', '.join(map(str, ranks))} have the same accelerator: start as many "
            "ranks on a host as it has, or show each its own"
            for (host, _), ranks in owners.items()
            if len(ranks) > 1
        }

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
        seconds = all_sum(own)[0] / self.ranks.world_size
        if self.ranks.is_first:
            told = json.dumps({"all_reduce": seconds, "ranks": self.rows}, indent=1)
            write_whole(self.folder / HEALTH, told + "\n")
        hosts = sorted({row["host"] for row in self.rows})
        return (
            f"{self.ranks.world_size} ranks on {len(hosts)} hosts ({', '.join(hosts)}); an "
            f"all-reduce of 16 MiB takes {seconds * 1000:,.1f} ms"
        )


def _verdict(problems: dict[str, str], *, weather: bool = False) -> dict[str, Any]:
    text = "; ".join(f"{host}: {problem}" for host, problem in sorted(problems.items()))
    return {"problem": text, "hosts": sorted(problems), "weather": weather}


def device_name(local_rank: int) -> str:
    """The accelerator of this rank, or cpu."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.accelerator.is_available():
        return "cpu"
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(device_index(local_rank))
    return str(torch.accelerator.current_accelerator())


def device_id(local_rank: int) -> str | None:
    """What tells this rank's accelerator from all others of its host; None where nothing does."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_properties(device_index(local_rank)).uuid)
