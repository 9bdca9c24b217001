"""Failing together: what goes wrong on one rank ends all of them, in seconds and with one line.

Ranks meet in a store, which rank 0's process has, or torchrun's agent. Whatever leaves training by
an exception is written there before its rank leaves. A thread of every other rank waits for that,
and ends its process whatever the main thread is in: a collective, a device, a disk. Collectives
cannot be called off from outside (gloo's never, NCCL's only by giving up what they compute), and
NCCL's watchdog aborts a process without a word: so nobody waits for them.

One rank speaks with all, on behalf of the others: the one that is first to fail. So what any other
asks of the store does not grow with the ranks.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from t5vae.cluster.errors import (
    FailedTogetherError,
    SharedError,
    SharedStorageError,
    UnhealthyError,
    judge,
)
from t5vae.cluster.phases import failed_in, present
from t5vae.cluster.process_group import leave_process_group
from t5vae.cluster.ranks import Ranks
from t5vae.cluster.rendezvous import is_agents, meet, missing
from t5vae.cluster.scheduler import host_name, queue_again
from t5vae.common.errors import UserError
from t5vae.common.quiet import log_file_of

GRACE = 2.0  # seconds in which a main thread may come to its end by itself
LINGER = 8.0  # seconds that rank 0, whose process has the store, stays for the others
ANSWER = 3.0  # seconds in which a process that lives answers
SKEW = 5.0  # seconds between the first and the last of those who wait for the same rank in vain
ASKING = ANSWER + SKEW + 1  # seconds in which a rank finds out by asking all others
GO_ON = "the same command goes on from the newest checkpoint"
COLLECTIVE = ("gloo", "nccl", "process group", "processgroup", "timed out", "connection")


@dataclass(frozen=True)
class Failure:
    """Why a run ends.

    Attributes:
        text: one line for people.
        code: that all ranks exit with.
        requeue: whether it is worth another start as it is.
        lost: ranks that answer no more.
    """

    text: str
    code: int
    requeue: bool = False
    lost: tuple[int, ...] = ()


class Together:
    """The ranks of a run, from when they meet until they leave; a process alone meets nobody.

    Inside, whatever is raised on one rank ends all of them. A rank that is lost, or does not answer
    any more, is named by the others.

    Args:
        ranks: which process this is.
        folder: the run's, in whose logs a traceback goes.
        patience: seconds that ranks wait for each other.
        may_requeue: whether a job that is to be run again may be.

    Attributes:
        store: that the ranks met in; None in a process alone.
    """

    def __init__(
        self,
        ranks: Ranks,
        folder: Path,
        patience: float,
        may_requeue: Callable[[], bool] = lambda: True,
    ):
        self.ranks, self.folder, self.patience = ranks, folder, patience
        self.may_requeue = may_requeue
        self.store: dist.Store | None = None
        self.failure: Failure | None = None
        self.again: bool | None = None
        self.decisions = 0
        self.ended = False
        self.listens = False  # the watching thread, to the store
        self.ending = threading.Lock()

    def __enter__(self) -> "Together":
        """Meet the others.

        Raises:
            UserError: where another run has the port to meet at.
            UnhealthyError: rank 0 does not come.
        """
        if self.ranks.world_size > 1:
            self.terminal = os.dup(2)  # libraries' output goes elsewhere at times
            self.store, own = meet(self.ranks, self.folder, self.patience)
            self.store.set(f"host/{self.ranks.rank}", host_name())
            self.watcher = threading.Thread(
                target=self._watch, args=(own,), name="together", daemon=True
            )
            self.watcher.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave; what went wrong is told to the others first.

        Raises:
            FailedTogetherError: where anything did, on any rank.
        """
        if self.store is None:
            return
        if error is None or isinstance(error, UnhealthyError):
            self._leave(self.ranks.world_size, judge(error).code if error else 0)
            return None if error else self._stop_listening(0)
        failure = self._end_by(self.failure or self._find(error))
        self.ending.acquire()  # for ever, where the watching thread ends this process
        code = self._end(failure)
        self._stop_listening(code)
        _after(GRACE, lambda: _exit(code))  # threads that write to a disk may hold it up
        leave_process_group()
        raise FailedTogetherError(code) from error

    def from_first(self, decide: Callable[[], Any]) -> Any:
        """What rank 0 decides, on all ranks, which call it together; it must be fit for JSON.

        Raises:
            SharedError, StorageError: what rank 0 has to complain of.
        """
        if self.store is None:
            return decide()
        self.decisions += 1
        key = f"decision/{self.decisions}"
        if self.ranks.is_first:
            try:
                value = decide()
            except UserError as error:
                raise SharedError(str(error)) from error
            self._store.set(key, json.dumps(value))
        self._store.wait([key], timedelta(seconds=self.patience))
        return json.loads(self._store.get(key))

    # The watching thread.

    def _watch(self, store: dist.Store) -> None:
        failure = None
        while failure is None:
            # That the store answers at all is told by its silence, which ends in time.
            guard = _after(2 * self.patience + ANSWER, self._give_up)
            self.listens = True
            try:
                failure = self._next(store)
            except RuntimeError:  # torch's, of a store that is gone
                failure = self._lost_store()
            finally:
                self.listens = False
                guard.cancel()
            if self.ended:
                return
        self._end_by(failure)
        time.sleep(GRACE)
        if self.ending.acquire(blocking=False):
            _exit(self._end(failure))

    @property
    def _store(self) -> dist.Store:
        assert self.store is not None
        return self.store

    def _next(self, store: dist.Store) -> Failure | None:
        """Wait until another rank wakes this one, or for as long as it has patience; why the run
        ends, if it does."""
        wake = f"wake/{self.ranks.rank}"
        try:
            store.wait([wake], timedelta(seconds=self.patience))
        except dist.DistStoreError:
            return None
        store.delete_key(wake)
        if store.check(["failure"]):
            return _failure(store.get("failure"))
        store.set(f"alive/{self.ranks.rank}", present())
        return None

    # What is wrong.

    def _find(self, error: BaseException) -> Failure:
        """Find out what an exception of this rank means, and tell the others."""
        try:
            if _is_of_a_collective(error):
                return self._after_a_collective(error)
            with self._in_time(ASKING):
                return self._report(self._own(error))
        except RuntimeError:
            return self._lost_store()

    @contextmanager
    def _in_time(self, seconds: float) -> Iterator[None]:
        """The store of a process that is stopped, or of a host without power, never answers."""
        guard = _after(seconds, self._give_up)
        try:
            yield
        finally:
            guard.cancel()

    def _give_up(self) -> None:
        failure = self._lost_store()
        self._tell(failure)
        _exit(failure.code)

    def _own(self, error: BaseException) -> Failure:
        verdict = judge(error)
        text = verdict.text
        if verdict.fault:
            text += self._write_down(error)
        if not isinstance(error, SharedError | SharedStorageError):
            text = f"{self._name([self.ranks.rank])}, {failed_in(error)}: {text}"
        return Failure(text, verdict.code, verdict.requeue)

    def _write_down(self, error: BaseException) -> str:
        """Keep a traceback in this rank's log; where it is, for people."""
        log, lines = log_file_of(self.folder, self.ranks.rank), traceback.format_exception(error)
        try:
            with open(log, "a") as file:
                file.writelines(lines)
        except OSError:
            os.write(self.terminal, "".join(lines).encode())
            return ""
        return f"; see {log}"

    def _after_a_collective(self, error: BaseException) -> Failure:
        """What the first rank whose collective failed finds out; the next, where that is lost."""
        turn = 0
        with self._in_time(ASKING):
            self._store.set(f"failed/{self.ranks.rank}", "")
        while True:
            with self._in_time(ASKING):
                if self._store.add(f"asks/{turn}", 1) == 1:
                    return self._report(self._ask_around(error))
            with self._in_time(ASKING + ANSWER), suppress(dist.DistStoreError):
                self._store.wait(["failure"], timedelta(seconds=ASKING))
                return _failure(self._store.get("failure"))
            turn += 1

    def _ask_around(self, error: BaseException) -> Failure:
        """Which ranks are lost, or hold the others up."""
        self._wake()
        if lost := self._silent("alive", ANSWER):
            return self._lost(lost)
        timed_out = "timed out" in str(error).lower()
        held_up = self._silent("failed", SKEW if timed_out else GRACE)
        if timed_out and held_up:
            where = self._store.get(f"alive/{held_up[0]}").decode()
            why = f"{self._name(held_up)} did not answer within {self.patience:g} s, in {where}"
        else:
            own = f"{self._name([self.ranks.rank])}, {failed_in(error)}"
            why = f"{own}: the ranks lost touch ({judge(error).text}{self._write_down(error)})"
        return Failure(f"{why}; {GO_ON}", code=1, requeue=True)

    def _silent(self, what: str, seconds: float) -> list[int]:
        """The ranks that have not said something after so long."""
        keys = [f"{what}/{rank}" for rank in range(self.ranks.world_size)]
        return missing(self._store, keys, seconds)

    def _report(self, failure: Failure) -> Failure:
        """Tell all ranks, unless another was faster; what they then end with."""
        own = json.dumps([self.ranks.rank, asdict(failure)])
        told = self._store.compare_set("failure", "", own)
        if told.decode() == own:
            self._wake()
        return _failure(told)

    def _wake(self) -> None:
        keys = [f"wake/{rank}" for rank in range(self.ranks.world_size)]
        self._store.multi_set(keys, ["1"] * len(keys))

    def _lost_store(self) -> Failure:
        if not is_agents():
            return self._lost([0])
        lost = () if self._is_beside_first else (0,)  # whose host may have taken the launcher along
        why = f"the launcher on {self._host(0)}, by which the ranks meet, is lost"
        return Failure(f"{why}: it ended, or its host did; {GO_ON}", 1, requeue=True, lost=lost)

    def _lost(self, lost: list[int]) -> Failure:
        why = "is lost: it ended, or its host did"
        if self.ranks.rank in lost:  # the first, whose own store is out of reach
            why = "reaches the other ranks no more"
        return Failure(f"{self._name(lost)} {why}; {GO_ON}", 1, requeue=True, lost=tuple(lost))

    @property
    def _is_beside_first(self) -> bool:
        """Whether this rank is on the first one's host."""
        return self.ranks.rank == self.ranks.local_rank

    def _name(self, some: list[int]) -> str:
        """Ranks and where they are, for people."""
        hosts = ", ".join({self._host(rank): 0 for rank in some})
        return f"rank {', '.join(map(str, some))} of {self.ranks.world_size} on {hosts}"

    def _host(self, rank: int) -> str:
        ranks = self.ranks
        if ranks.hosts:
            return ranks.hosts[rank]
        if rank == ranks.rank or not ranks.spans_hosts:
            return host_name()
        if rank == 0 or not self._store.check([f"host/{rank}"]):
            return ranks.master_addr if rank == 0 else "another host"
        return self._store.get(f"host/{rank}").decode()

    # The end.

    def _end_by(self, failure: Failure) -> Failure:
        """Know of it; whether the job is to run again is settled now: what started the ranks tells
        the others to end once one has."""
        self.failure = failure
        if self.again is None:
            self.again = failure.requeue and self.ranks.is_first and self.may_requeue()
        return failure

    def _end(self, failure: Failure) -> int:
        """Say what is wrong if that is this rank's to do, let the others go, and have the job run
        again if that helps; the exit code."""
        self._tell(failure)
        self._leave(self.ranks.world_size - len(failure.lost), failure.code)
        # A first host that is lost takes the job's script with it, which the scheduler sees itself.
        if self.again:
            try:
                queue_again()
            except SystemExit as asked:
                return int(asked.code or 0)
        return failure.code

    def _tell(self, failure: Failure) -> None:
        """Rank 0 speaks for all; without it, the first of each host does."""
        first_of_others = self.ranks.local_rank == (1 if self._is_beside_first else 0)
        if self.ranks.is_first or (0 in failure.lost and first_of_others):
            shown = "\n\x1b[?25h" if os.isatty(self.terminal) else ""  # after a bar; a cursor again
            os.write(self.terminal, f"{shown}error: {failure.text}\n".encode())

    def _stop_listening(self, code: int) -> None:
        """A thread that could not be told to end waits in torch, which would abort this process."""
        if self.listens:
            _exit(code)

    def _leave(self, others: int, code: int) -> None:
        """End the watching thread; rank 0 then stays until the others have left."""
        self.ended = True
        guard = _after(2 * LINGER, lambda: _exit(code))
        with suppress(RuntimeError):
            if threading.current_thread() is not self.watcher:
                self._store.set(f"wake/{self.ranks.rank}", "1")
                self.watcher.join(ANSWER)
            if self._store.add("left", 1) >= others:
                self._store.set("all left", "")
            elif self.ranks.is_first:
                self._store.wait(["all left"], timedelta(seconds=LINGER))
        guard.cancel()


def _failure(told: bytes) -> Failure:
    """What a rank has told the others, whose number goes before it."""
    _, failure = json.loads(told)
    return Failure(**failure | {"lost": tuple(failure["lost"])})


def _after(seconds: float, act: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
    return timer


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    os._exit(code)


def _is_of_a_collective(error: BaseException) -> bool:
    """Whether other ranks made a call fail; torch has no type of its own for gloo's errors."""
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(w in str(error).lower() for w in COLLECTIVE)
