"""What ranks ask of their store, at numbers of ranks; and what a process may open."""

import os
import resource
from pathlib import Path

import pytest
import torch.distributed as dist

from t5vae.cluster import descriptors, process_group, rendezvous, together
from t5vae.cluster.descriptors import allow_files, files_of, too_few_files
from t5vae.cluster.ranks import Ranks
from t5vae.cluster.rendezvous import missing
from t5vae.cluster.together import Together
from t5vae.common.errors import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LOST = RuntimeError("gloo: Connection closed by peer")
MOST = {"meet": 4, "preflight": 5, "decision": 3, "leave": 7, "lost rank": 15}
"""Calls of a rank, one of its watching thread's in this phase or in that."""


@pytest.fixture
def soon(monkeypatch):
    """Ranks that answer at once if they do."""
    for name, seconds in {"ANSWER": 0.5, "GRACE": 0.5, "SKEW": 0.5}.items():
        monkeypatch.setattr(together, name, seconds)


def test_what_a_rank_asks_does_not_grow_with_the_ranks(soon, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _scale_ranks

    found = {(row["ranks"], row["phase"]): row for row in _scale_ranks.rows((4, 32))}
    for phase, most in MOST.items():
        few, many = found[4, phase], found[32, phase]
        assert few["other_calls"] <= most, few
        assert many["other_calls"] <= most, many
        assert many["other_keys"] <= most, many
        assert many["speaker_calls"] <= few["speaker_calls"] + 12, many
        assert many["all_calls"] <= 8 * few["all_calls"] + 80, many


class Checked(dist.Store):
    """A store that counts how often it is asked what is there."""

    def __init__(self, store):
        super().__init__()
        self.store, self.count = store, 0

    def wait(self, keys, timeout):
        self.store.wait(keys, timeout)

    def check(self, keys):
        self.count += 1
        return self.store.check(keys)


@pytest.mark.parametrize(
    ("absent", "most"), [([], 0), ([0], 21), ([1023], 21), ([7, 300, 301], 63)]
)
def test_a_few_missing_of_many_are_found_by_few_questions(absent, most):
    keys = [f"alive/{rank}" for rank in range(1024)]
    store = Checked(dist.HashStore())
    for rank in {*range(1024)} - {*absent}:
        store.store.set(keys[rank], "")
    assert missing(store, keys, 0.05) == absent
    assert store.count <= most


def test_the_next_asks_where_the_one_that_asked_is_lost(soon, monkeypatch, tmp_path):
    monkeypatch.setattr(together, "ASKING", 1.5)
    one = Together(Ranks(1, 4, 1, 4, "127.0.0.1", 1, ("node1",) * 4), tmp_path, 60)
    one.store = dist.HashStore()
    one.store.add("asks/0", 1)  # rank 3, which says no more
    for rank in (0, 1, 2):
        one.store.set(f"alive/{rank}", "")
    failure = one._find(LOST)
    assert failure.lost == (3,)
    assert failure.text.startswith("rank 3 of 4 on node1 is lost: ")
    assert one._find(LOST) == failure  # as any other hears it


def test_of_several_failures_one_is_told_and_its_rank_alone_wakes_the_others(tmp_path):
    store, told = dist.HashStore(), together.Failure("the losses are not finite", 2)
    for rank in (0, 1):
        one = Together(Ranks(rank, 2, rank, 2, "127.0.0.1", 1, ("node1",) * 2), tmp_path, 60)
        one.store = store
        assert one._report(told) == told
        assert store.check(["wake/0", "wake/1"]) is (rank == 0)
        for key in ("wake/0", "wake/1"):
            store.delete_key(key)


@pytest.fixture
def limit(monkeypatch):
    """What this process may open, soft and hard; not the real one."""
    held = {}

    def may(soft, hard):
        held["now"] = (soft, hard)

    monkeypatch.setattr(descriptors.resource, "getrlimit", lambda _: held["now"])
    monkeypatch.setattr(descriptors.resource, "setrlimit", lambda _, pair: may(*pair))
    may.held = held
    return may


def test_a_process_may_open_what_its_ranks_need_as_far_as_its_host_allows(limit):
    wanted = files_of(1024, has_store=True)
    assert wanted > files_of(1024, has_store=False) > 3 * 1023
    limit(1024, 2**20)
    allow_files(wanted)
    assert limit.held["now"] == (wanted, 2**20)
    assert too_few_files(wanted) is None
    limit(2**19, 2**20)
    allow_files(wanted)
    assert limit.held["now"][0] == 2**19
    limit(1024, 4096)
    allow_files(wanted)
    assert limit.held["now"] == (4096, 4096)
    assert "4,096 open files here, and needs 6,656" in too_few_files(wanted)
    limit(resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert too_few_files(wanted) is None


def test_a_first_rank_that_cannot_be_reached_by_all_says_so_in_a_line(limit, tmp_path):
    limit(1024, 4096)
    ranks = Ranks(0, 1024, 0, 8, "127.0.0.1", 1, ())
    with pytest.raises(UserError, match=r"4,096 open files here, and needs 6,656 .*ulimit -Hn"):
        rendezvous.meet(ranks, tmp_path, 1)


@pytest.mark.parametrize("own", [None, "timeout:3"])
def test_the_first_look_up_settles_how_long_a_mute_name_server_is_waited_for(own, monkeypatch):
    monkeypatch.delenv("RES_OPTIONS", raising=False)
    if own:
        monkeypatch.setenv("RES_OPTIONS", own)
    seen = []
    look_up = lambda *_: seen.append(os.environ["RES_OPTIONS"])  # noqa: E731
    monkeypatch.setattr(process_group.socket, "getaddrinfo", look_up)
    process_group.require_address(Ranks(0, 1, 0, 1, "node1", 1, ()))
    assert seen == [own or "timeout:1 attempts:2"]
