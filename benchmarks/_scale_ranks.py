"""What ranks ask of the store that they meet in, counted at numbers of ranks.

    python benchmarks/_scale_ranks.py

All ranks are in one process, with the product's own threads, and their store is in its memory: each
meets, passes the preflight, hears a decision, and then leaves, or finds that its collective failed
because the last rank is lost.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import _report  # noqa: F401 (makes `shards` the package)
import torch.distributed as dist

from t5vae.cluster import together
from t5vae.cluster.errors import FailedTogetherError
from t5vae.cluster.preflight import Preflight
from t5vae.cluster.ranks import Ranks
from t5vae.cluster.together import Together

WORLDS = (1, 8, 64, 1024)
PATIENCE = 600.0
CONNECTION_CLOSED = "gloo: Connection closed by peer"


class Memory:
    """A store that wakes those alone who wait for a key; torch's in memory wakes all, each time."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.waiting: dict[str, list[threading.Event]] = {}
        self.turn = threading.RLock()

    def set(self, key: str, value: bytes | str) -> None:
        with self.turn:
            self.values[key] = value.encode() if isinstance(value, str) else value
            for one in self.waiting.pop(key, ()):
                one.set()

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        end = time.monotonic() + timeout.total_seconds()
        for key in keys:
            with self.turn:
                if key in self.values:
                    continue
                self.waiting.setdefault(key, []).append(there := threading.Event())
            if not there.wait(max(0.0, end - time.monotonic())):
                raise dist.DistStoreError(f"wait timeout: {key}")

    def get(self, key: str) -> bytes:
        self.wait([key], timedelta(seconds=PATIENCE))
        return self.values[key]

    def add(self, key: str, amount: int) -> int:
        with self.turn:
            total = int(self.values.get(key, 0)) + amount
            self.set(key, str(total))
            return total

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        with self.turn:
            if self.values.get(key, b"").decode() == expected:
                self.set(key, desired)
            return self.values[key]

    def delete_key(self, key: str) -> bool:
        with self.turn:
            return self.values.pop(key, None) is not None

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def multi_set(self, keys: list[str], values: list[str]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)


class Counted(dist.Store):
    """A store whose calls are counted.

    Attributes:
        calls: by phase.
        keys: of those calls.
        phase: now.
    """

    def __init__(self, store: Memory):
        super().__init__()
        self.store, self.phase = store, "meet"
        self.calls: Counter[str] = Counter()
        self.keys: Counter[str] = Counter()

    def _count(self, keys: int = 1) -> Memory:
        self.calls[self.phase] += 1
        self.keys[self.phase] += keys
        return self.store

    def set(self, key: str, value: bytes) -> None:
        self._count().set(key, value)

    def get(self, key: str) -> bytes:
        return self._count().get(key)

    def add(self, key: str, amount: int) -> int:
        return self._count().add(key, amount)

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        return self._count().compare_set(key, expected, desired)

    def delete_key(self, key: str) -> bool:
        return self._count().delete_key(key)

    def check(self, keys: list[str]) -> bool:
        return self._count(len(keys)).check(keys)

    def wait(self, keys: list[str], timeout: timedelta = timedelta(seconds=PATIENCE)) -> None:
        self._count(len(keys)).wait(keys, timeout)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self._count(len(keys)).multi_get(keys)

    def multi_set(self, keys: list[str], values: list[bytes]) -> None:
        self._count(len(keys)).multi_set(keys, values)

    def has_extended_api(self) -> bool:
        return True


class Fleet:
    """Ranks of one process that have met.

    Args:
        world: how many.
        folder: of their run.
    """

    def __init__(self, world: int, folder: Path):
        hosts, shared = tuple(f"node{rank // 8}" for rank in range(world)), Memory()
        connection = SimpleNamespace(clone=lambda: None)
        self.all: list[Together] = []
        self.stores: list[Counted] = []
        for rank in range(world):
            ranks = Ranks(rank, world, rank % 8, min(world, 8), "127.0.0.1", 29500, hosts)
            with (
                patch.object(dist, "TCPStore", lambda *_, **__: connection),
                patch.object(dist, "PrefixStore", lambda *_: self._counted(shared)),
            ):
                self.all.append(Together(ranks, folder, PATIENCE).__enter__())
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.all[-1].terminal)

    def _counted(self, shared: Memory) -> Counted:
        self.stores.append(Counted(shared))
        return self.stores[-1]

    def together(self, phase: str, do: Any, of: int) -> None:
        """The first so many ranks do something, each in a thread."""
        for store in self.stores:
            store.phase = phase
        with ThreadPoolExecutor(of) as threads:
            list(threads.map(do, self.all[:of]))

    def lose_last(self) -> None:
        last = self.all[-1]
        last.ended = True
        wake, alive = f"wake/{last.ranks.rank}", f"alive/{last.ranks.rank}"
        last._store.set(wake, "1")
        last.watcher.join()
        last._store.delete_key(alive)

    def rows(self) -> Iterator[dict[str, Any]]:
        """What the calls of each phase came to; a rank has two stores."""
        pairs = list(zip(self.stores[::2], self.stores[1::2], strict=True))
        for phase in {phase: 0 for store in self.stores for phase in store.calls}:
            calls = [a.calls[phase] + b.calls[phase] for a, b in pairs]
            keys = [a.keys[phase] + b.keys[phase] for a, b in pairs]
            speaker = max(range(len(keys)), key=keys.__getitem__)
            yield {
                "ranks": len(self.all),
                "phase": phase,
                "speaker_calls": calls[speaker],
                "speaker_keys": keys[speaker],
                "other_calls": max(calls[:speaker] + calls[speaker + 1 :]),
                "other_keys": max(keys[:speaker] + keys[speaker + 1 :]),
                "all_calls": sum(calls),
            }


def go_well(fleet: Fleet, folder: Path) -> None:
    """A preflight, a decision, and leaving."""

    def preflight(one: Together) -> None:
        with Preflight(one.ranks, folder, PATIENCE, one.store):
            pass

    world = len(fleet.all)
    fleet.together("preflight", preflight, world)
    fleet.together("decision", lambda one: one.from_first(lambda: True), world)
    fleet.together("leave", lambda one: one.__exit__(None, None, None), world)


def lose_one(fleet: Fleet) -> None:
    """The collective of all fails, since the last rank is lost."""

    def fail(one: Together) -> None:
        error = RuntimeError(CONNECTION_CLOSED)
        with contextlib.suppress(FailedTogetherError, SystemExit):
            one.__exit__(RuntimeError, error, None)

    fleet.lose_last()
    fleet.together("lost rank", fail, len(fleet.all) - 1)


def rows(worlds: tuple[int, ...] = WORLDS) -> list[dict[str, Any]]:
    """Calls, and keys of those calls, of the rank that speaks with all and of any other.

    A process alone has no store, and asks nothing.
    """
    found = []
    with TemporaryDirectory() as name, patch.object(together, "_exit", sys.exit):
        folder = Path(name)
        for world in (world for world in worlds if world > 1):
            fleet = Fleet(world, folder)
            go_well(fleet, folder)
            found += fleet.rows()
            fleet = Fleet(world, folder)
            lose_one(fleet)
            found += [row for row in fleet.rows() if row["phase"] == "lost rank"]
        time.sleep(2 * together.GRACE)  # until no thread ends the process any more
    return found


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row))
