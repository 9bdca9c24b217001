import socket
from dataclasses import replace

import psutil
import pytest

from t5vae.cluster import agreement, process_group
from t5vae.cluster.agreement import check_same, check_shared, raise_together
from t5vae.cluster.process_group import free_port, network_interface
from t5vae.cluster.ranks import Ranks, find_ranks
from t5vae.cluster.rendezvous import meet
from t5vae.cluster.scheduler import expand_hosts
from t5vae.common.errors import UserError
from tests.refused import refusal

DEEPSPEED = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
# What a job's batch script, and a shell under salloc, find in their environment.
JOB = {
    "SLURM_JOB_ID": "41234",
    "SLURM_JOB_NODELIST": "gpu[03-04]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODELIST": "gpu[03-04]",
}
SBATCH = {**JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SRUN = {
    **JOB,
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}
ALONE = (0, 1, 0, 1)


def counts(ranks: Ranks) -> tuple[int, int, int, int]:
    return ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size


@pytest.mark.parametrize("env", [DEEPSPEED, TORCHRUN], ids=["deepspeed", "torchrun"])
def test_a_launchers_variables_are_taken(env):
    assert find_ranks(env) == Ranks(3, 4, 1, 2, "10.0.0.1", 29500)


@pytest.mark.parametrize(
    "env", [{"LOCAL_WORLD_SIZE": "4"}, {"LOCAL_SIZE": "4"}, {"LOCAL_SIZE": "4", "RANK": "0"}]
)
def test_ranks_of_one_host_need_no_name_of_it(env):
    elsewhere = {"MASTER_ADDR": "node1.invalid"}
    assert find_ranks({**DEEPSPEED, **elsewhere, **env}).master_addr == "127.0.0.1"
    step = {"SLURM_STEP_NODELIST": "gpu03", "SLURM_STEP_TASKS_PER_NODE": "4"}
    assert find_ranks({**SRUN, **step}).master_addr == "127.0.0.1"
    assert find_ranks({**SRUN, **step}).hosts == ("gpu03",) * 4


def test_ranks_that_may_be_on_several_hosts_keep_the_address(monkeypatch):
    alone = {"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for env in ({}, alone, {"LOCAL_WORLD_SIZE": ""}):
        assert find_ranks({**TORCHRUN, **env}).master_addr == "10.0.0.1"


@pytest.mark.parametrize("name", ["no.such.host.invalid", "gpu03.invalid", "a..b"])
def test_a_name_that_leads_nowhere_is_refused(monkeypatch, name):
    monkeypatch.setattr(process_group, "RESOLVING", 0.1)
    monkeypatch.setenv("SLURMD_NODENAME", "gpu04")
    told = refusal(process_group.require_address, replace(find_ranks(SRUN), master_addr=name))
    assert told.startswith(f"gpu04 finds no address for {name}, where rank 0 is")


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "10.0.0.1", "::1"])
def test_a_name_or_an_address_that_leads_somewhere_is_not(name):
    process_group.require_address(replace(find_ranks(SRUN), master_addr=name))


def test_a_launchers_variables_go_before_sruns():
    assert find_ranks({**SRUN, **TORCHRUN, "RANK": "2"}).rank == 2


def test_without_a_local_size_all_ranks_are_taken_to_be_on_this_host():
    env = {name: value for name, value in DEEPSPEED.items() if name != "LOCAL_SIZE"}
    assert find_ranks(env).local_world_size == 4


def test_sruns_variables_are_taken():
    ranks = find_ranks(SRUN)
    assert counts(ranks) == (3, 4, 1, 2)
    assert ranks.master_addr == "gpu03"
    assert 1024 < ranks.master_port < 65536


def test_all_tasks_of_a_step_choose_the_same_master_and_port():
    every = [find_ranks({**SRUN, "SLURM_PROCID": str(rank)}) for rank in range(4)]
    assert len({(ranks.master_addr, ranks.master_port) for ranks in every}) == 1
    assert [ranks.is_first for ranks in every] == [True, False, False, False]


def test_tasks_spread_unevenly_over_hosts_are_read():
    assert find_ranks({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3,1"}).world_size == 4


@pytest.mark.parametrize("job", ["1", "19999", "20000", "4294967295"])
def test_any_job_number_gives_a_free_unprivileged_port(job):
    assert 20_000 <= find_ranks({**SRUN, "SLURM_JOB_ID": job}).master_port < 40_000


@pytest.mark.parametrize("env", [{}, JOB, SBATCH], ids=["nothing", "salloc", "sbatch"])
def test_nobody_to_wait_for_means_a_single_process(env):
    ranks = find_ranks(env)
    assert counts(ranks) == ALONE
    assert ranks.is_first


def without(env: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in env.items() if key != name}


MALFORMED = {
    "rank alone": {"RANK": "0"},
    "world size alone": {"WORLD_SIZE": "2"},
    "no master": without(TORCHRUN, "MASTER_ADDR"),
    "no port": without(TORCHRUN, "MASTER_PORT"),
    "no local rank": without(TORCHRUN, "LOCAL_RANK"),
    "rank is text": {**TORCHRUN, "RANK": "first"},
    "rank is empty": {**TORCHRUN, "RANK": ""},
    "port is text": {**TORCHRUN, "MASTER_PORT": "http"},
    "rank too large": {**TORCHRUN, "RANK": "4"},
    "rank below 0": {**TORCHRUN, "RANK": "-1"},
    "no ranks": {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "0"},
    "srun: rank is text": {**SRUN, "SLURM_PROCID": "x"},
    "srun: tasks empty": {**SRUN, "SLURM_STEP_NUM_TASKS": ""},
    "srun: tasks per node is text": {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "many"},
    "srun: no tasks": without(SRUN, "SLURM_STEP_NUM_TASKS"),
    "srun: no local rank": without(SRUN, "SLURM_LOCALID"),
    "srun: no job": without(SRUN, "SLURM_JOB_ID"),
    "srun: no hosts": without(SRUN, "SLURM_STEP_NODELIST"),
}


@pytest.mark.parametrize("env", MALFORMED.values(), ids=MALFORMED)
def test_an_incomplete_or_malformed_environment_is_refused_in_one_line(env):
    with pytest.raises(UserError) as caught:
        find_ranks(env)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("localhost", "localhost"),
        ("a1,b2", "a1 b2"),
        ("gpu[03-05,9],b1", "gpu03 gpu04 gpu05 gpu9 b1"),
        ("b1,gpu[03-05]", "b1 gpu03 gpu04 gpu05"),
        ("gpu[3]", "gpu3"),
        ("gpu[007,010-012]", "gpu007 gpu010 gpu011 gpu012"),
        ("gpu[098-101]", "gpu098 gpu099 gpu100 gpu101"),
        ("a-b-01", "a-b-01"),
        ("a-b-[01-02]", "a-b-01 a-b-02"),
        ("node[1-2].cluster", "node1.cluster node2.cluster"),
        ("rack[1-2]n[3-4]", "rack1n3 rack1n4 rack2n3 rack2n4"),
        ("node1.cluster,node[2-3].cluster", "node1.cluster node2.cluster node3.cluster"),
    ],
)
def test_slurms_compressed_list_of_hosts_is_expanded(nodelist, hosts):
    assert expand_hosts(nodelist) == hosts.split()


def test_a_folder_that_all_ranks_see_is_shared(together, tmp_path):
    (tmp_path / "mark").write_text("like no other")
    seen = together(3).run(lambda rank: check_shared(tmp_path / "mark"))
    assert [told.exception() for told in seen] == [None] * 3


def test_ranks_that_see_another_folder_are_named_on_all_ranks(together, tmp_path):
    hosts = [tmp_path / str(rank) for rank in range(3)]
    for host, content in zip(hosts, ("like no other", "an older one's", None), strict=True):
        host.mkdir()
        if content:
            (host / "mark").write_text(content)
    seen = together(3).run(lambda rank: check_shared(hosts[rank] / "mark"))
    for told, host in zip(seen, hosts, strict=True):
        error = told.exception()
        assert isinstance(error, UserError)
        assert str(error).startswith("rank 1, 2 of 3 does not find what rank 0 wrote in ")
        assert str(host) in str(error)


def test_srun_says_where_each_rank_is():
    assert find_ranks(SRUN).hosts == ("gpu03", "gpu03", "gpu04", "gpu04")
    uneven = find_ranks({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3,1"})
    assert uneven.hosts == ("gpu03", "gpu03", "gpu03", "gpu04")
    assert uneven.spans_hosts
    assert not find_ranks({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4"}).spans_hosts
    assert find_ranks(DEEPSPEED).hosts == ()


def test_the_interface_is_the_one_that_leads_to_another_host():
    routed = {name for name in psutil.net_if_addrs() if name != "lo"}
    elsewhere = Ranks(0, 2, 0, 1, "here", 1, ("here", "192.0.2.1"))
    assert network_interface(replace(elsewhere, master_addr="192.0.2.1")) in {*routed, None}
    assert network_interface(Ranks(0, 2, 0, 1, "127.0.0.1", 1)) is None
    assert network_interface(Ranks(0, 2, 0, 1, "no.such.host.invalid", 1)) is None


def test_a_problem_of_one_host_is_told_with_its_name(together, monkeypatch):
    ranks = together(3)
    names = ("node1", "node1", "node2")
    monkeypatch.setattr(agreement, "host_name", lambda: names[ranks.get_rank()])

    def told(*problems):
        seen = ranks.run(lambda rank: raise_together(problems[rank] and UserError(problems[rank])))
        return {str(future.exception()) for future in seen}

    assert told(None, None, None) == {"None"}
    assert told(None, None, "no room") == {"rank 2 of 3 on node2: no room"}
    assert told(None, "no lock", None) == {"rank 1 of 3 on node1: no lock"}
    assert told(None, "one", "another") == {"rank 1 of 3 on node1: one"}
    assert told("same", "same", "same") == {"same"}


def test_ranks_that_do_not_train_the_same_are_named(together, monkeypatch):
    ranks = together(3)
    names = ("node1", "node2", "node2")
    monkeypatch.setattr(agreement, "host_name", lambda: names[ranks.get_rank()])

    def told(*shards):
        facts = [{"seed": 7, "shards": each, "model": {"layers": 2}} for each in shards]
        seen = ranks.run(lambda rank: check_same(facts[rank]))
        return {str(future.exception()) for future in seen}

    assert told("aa", "aa", "aa") == {"None"}
    assert told("aa", "aa", "bb") == {
        "rank 2 of 3 on node2 differs from rank 0 on node1 in shards: give all hosts the same"
    }
    assert {text.partition(" differs ")[0] for text in told("aa", "bb", "cc")} == {
        "rank 1, 2 of 3 on node2"
    }


@pytest.mark.parametrize(("visible", "devices"), [(4, [0, 1, 2, 3]), (1, [0, 0, 0, 0])])
def test_a_rank_that_is_shown_its_own_device_alone_takes_that(monkeypatch, visible, devices):
    monkeypatch.setattr("torch.accelerator.device_count", lambda: visible)
    assert [process_group.device_index(rank) for rank in range(4)] == devices


def test_a_port_that_another_program_has_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refusal(meet, Ranks(0, 2, 0, 2, "127.0.0.1", port), tmp_path, 2)
    assert line.startswith(f"port {port} of rank 0's host is taken")


def test_ranks_of_another_start_of_a_run_do_not_join_its_store(tmp_path):
    port = free_port()
    first = [Ranks(rank, 2, rank, 2, "127.0.0.1", port) for rank in range(2)]
    stores = [meet(ranks, tmp_path, 20) for ranks in first]
    for ranks in first:
        assert refusal(meet, ranks, tmp_path, 2).startswith(f"port {port} of rank 0's host is ")
    stores[0][0].set("mark", "theirs")
    other, _ = meet(first[1], tmp_path / "another run", 20)
    assert not other.check(["mark"])
