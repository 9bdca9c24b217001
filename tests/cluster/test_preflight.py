import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from t5vae.cluster import preflight, rendezvous
from t5vae.cluster.errors import UnhealthyError, judge
from t5vae.cluster.preflight import Preflight
from t5vae.cluster.process_group import free_port
from t5vae.cluster.ranks import Ranks
from t5vae.common.errors import StorageError, UserError

HOSTS = ("node1", "node1", "node2", "node2")


@pytest.fixture
def meet(tmp_path, monkeypatch):
    """Ranks of two hosts, as threads, each with its problem: what each is told, and the first's.

    A rank whose problem is "absent" does not come; one that is a number comes later.
    """
    monkeypatch.setattr(rendezvous, "quiet_start", lambda path: contextlib.nullcontext())

    def run(*problems, patience=30):
        port = free_port()
        preflights = []

        def rank_main(rank):
            ranks = Ranks(rank, 4, rank % 2, 2, "127.0.0.1", port, HOSTS)
            try:
                store, _ = rendezvous.meet(ranks, tmp_path, patience)
                own = Preflight(ranks, tmp_path, patience, store)
                preflights.append(own)
                with own:
                    if isinstance(problems[rank], float):
                        time.sleep(problems[rank])
                    elif isinstance(problems[rank], Exception):
                        raise problems[rank]
                    elif problems[rank]:
                        raise UserError(problems[rank])
            except (UserError, StorageError) as error:
                return error

        come = [rank for rank in range(4) if problems[rank] != "absent"]
        with ThreadPoolExecutor(4) as threads:
            told = [threads.submit(rank_main, rank) for rank in come]
        first = next((one for one in preflights if one.ranks.is_first), None)
        return [future.result() for future in told], first

    return run


def test_ranks_that_are_well_go_on_and_their_hosts_are_known(meet):
    told, first = meet(None, None, 0.5, None)
    assert told == [None] * 4
    assert [row["host"] for row in first.rows] == list(HOSTS)
    assert [row["rank"] for row in first.rows] == [0, 1, 2, 3]
    assert {row["device"] for row in first.rows} == {"cpu"}
    assert all(row["free"] > 0 and row["free_scratch"] > 0 for row in first.rows)
    assert first.rows[2]["seconds"] >= 0.5


def test_a_host_that_cannot_train_is_named_on_all_ranks(meet):
    told, _ = meet(None, None, "no shards at x", None)
    assert [str(error) for error in told] == ["node2: no shards at x"] * 4
    assert all(isinstance(error, UnhealthyError) for error in told)
    assert [error.hosts for error in told] == [["node2"]] * 4
    assert [error.is_first_healthy for error in told] == [True, False, False, False]


def test_the_first_host_may_be_the_one(meet):
    told, _ = meet("no room", "no room", None, None)
    assert [str(error) for error in told] == ["node1: no room"] * 4
    assert [error.is_first_healthy for error in told] == [False, False, True, False]


def test_a_mistake_that_all_hosts_see_is_the_users(meet):
    told, _ = meet(*["no shards at x"] * 4)
    assert [str(error) for error in told] == ["no shards at x"] * 4
    assert not any(isinstance(error, UnhealthyError) for error in told)


def test_a_rank_that_cannot_train_where_others_of_its_host_can_is_named(meet):
    told, _ = meet(None, "no shards at x", None, "no shards at y")
    assert [str(error) for error in told] == ["rank 1 of 4 on node1: no shards at x"] * 4
    assert not any(isinstance(error, UnhealthyError) for error in told)


def test_a_host_that_does_not_come_is_named_in_time(meet):
    told, _ = meet(None, None, "absent", "absent", patience=5)
    assert [str(error) for error in told] == ["node2: did not come within 5 s"] * 2
    assert told[0].is_first_healthy


def test_a_first_host_that_does_not_answer_is_named(meet):
    told, _ = meet("absent", "absent", None, None, patience=5)
    assert [str(error) for error in told] == ["rank 0 on node1 does not answer"] * 2
    assert [error.is_first_healthy for error in told] == [True, False]


def test_a_host_without_the_accelerator_of_the_others_is_named(meet, monkeypatch):
    devices = iter(["H100", "H100", "H100", "cpu"])
    monkeypatch.setattr(preflight, "device_name", lambda local_rank: next(devices))
    told, _ = meet(None, None, None, None)
    (text,) = {str(error) for error in told}
    assert text.endswith("has no accelerator, which others have")


def test_a_host_without_room_for_temporary_files_is_named(meet, monkeypatch):
    monkeypatch.setattr(preflight, "SCRATCH", 1 << 60)
    told, _ = meet(None, None, None, None)
    assert all("MiB free" in str(error) for error in told)


def test_a_fault_of_the_program_is_nobodys_illness(tmp_path):
    ranks = Ranks(0, 4, 0, 2, "127.0.0.1", free_port(), HOSTS)
    with pytest.raises(ZeroDivisionError), Preflight(ranks, tmp_path, 2, dist.HashStore()):
        raise ZeroDivisionError


def test_a_process_alone_asks_nobody(tmp_path):
    ranks = Ranks(0, 1, 0, 1, "127.0.0.1", 1)
    with pytest.raises(UserError, match="as it is"), Preflight(ranks, tmp_path, 2, None):
        raise UserError("as it is")
    with Preflight(ranks, tmp_path, 2, None) as alone:
        pass
    assert alone.report(torch.device("cpu")) is None


def test_storage_that_fails_some_hosts_or_all_is_no_mistake(meet):
    weather = StorageError("/data/index.json: the storage fails")
    told, _ = meet(None, None, weather, weather)
    assert [str(error) for error in told] == [f"node2: {weather}"] * 4
    assert all(isinstance(error, UnhealthyError) and error.weather for error in told)
    assert [judge(error).code for error in told] == [1] * 4
    told, _ = meet(*[weather] * 4)
    assert [str(error) for error in told] == [str(weather)] * 4
    assert all(isinstance(error, StorageError) for error in told)
    told, _ = meet(weather, "no shards at x", None, None)
    assert [judge(error).code for error in told] == [2] * 4


def test_ranks_that_share_an_accelerator_are_named(meet, monkeypatch):
    monkeypatch.setattr(preflight, "device_name", lambda local_rank: "H100")
    monkeypatch.setattr(preflight, "device_id", lambda local_rank: f"GPU-{local_rank}")
    assert meet(None, None, None, None)[0] == [None] * 4
    monkeypatch.setattr(preflight, "device_id", lambda local_rank: "GPU-0")
    told, _ = meet(None, None, None, None)
    assert {judge(error).code for error in told} == {2}
    assert str(told[3]).startswith("ranks 0, 1 have the same accelerator: ")
    monkeypatch.setattr(preflight, "device_id", lambda local_rank: None)
    assert meet(None, None, None, None)[0] == [None] * 4


def test_the_report_times_an_all_reduce_and_is_kept(meet, monkeypatch):
    reduced = []
    monkeypatch.setattr(dist, "all_reduce", lambda numbers: reduced.append(numbers.nbytes))
    monkeypatch.setattr(preflight, "all_sum", lambda seconds: [4 * seconds])
    _, first = meet(None, None, None, None)
    line = first.report(torch.device("cpu"))
    assert line.startswith("4 ranks on 2 hosts (node1, node2); an all-reduce of 16 MiB takes ")
    assert set(reduced) == {16 * 2**20}
    written = json.loads((first.folder / "health.json").read_text())
    assert written["ranks"] == first.rows
    assert written["all_reduce"] >= 0
