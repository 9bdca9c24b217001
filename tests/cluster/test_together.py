"""Ranks that fail together; without a model, forked by a process that has all imports."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from t5vae.common.cpus import cpus
from tests.launching import environment

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]


@dataclass
class Ended:
    """How ranks ended.

    Attributes:
        codes: of each rank; None where it had to be killed.
        lines: those that say what is wrong, with their ranks.
    """

    codes: list[int | None]
    seconds: float
    outputs: list[str]

    @property
    def lines(self) -> list[tuple[int, str]]:
        told = enumerate(map(str.splitlines, self.outputs))
        return [(r, line) for r, lines in told for line in lines if line.startswith("error: ")]


def busy() -> float:
    """The load of a core, where that is more than 1."""
    return max(1.0, os.getloadavg()[0] / cpus())


@pytest.fixture(scope="module")
def server():
    env = environment() | {"PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, str(Path(__file__).with_name("_together.py"))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def end(server, tmp_path):
    """Let three ranks do something, and see how they end."""

    def run(
        *does: str,
        world: int = 3,
        timeout: float = 30,
        others: str = "collective",
        traceback: bool = False,
        agent: bool = False,
    ) -> Ended:
        wanted = {str(rank): what for rank, what in enumerate(does) if what}
        request = {"world": world, "timeout": timeout, "folder": str(tmp_path)}
        request["agent"] = agent
        server.stdin.write(json.dumps(request | {"does": {"others": others} | wanted}) + "\n")
        server.stdin.flush()
        ended = Ended(**json.loads(server.stdout.readline()))
        assert ended.seconds < 20 * busy(), ended
        assert any("Traceback" in output for output in ended.outputs) is traceback, ended
        return ended

    (tmp_path / "logs").mkdir()
    return run


def test_ranks_that_are_well_leave_with_0_and_the_first_waits_for_the_last(end):
    ended = end("nothing", "nothing", "is slow", timeout=10)
    assert ended.codes == [0, 0, 0]
    assert ended.outputs == ["", "", ""]


@pytest.mark.parametrize("others", ["collective", "device", "python"])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_what_one_rank_refuses_ends_all_whatever_they_are_at(end, failing, others):
    does = ["", "", ""]
    does[failing] = "refuses"
    ended = end(*does, others=others)
    assert ended.codes == [2, 2, 2]
    host = ("node1", "node1", "node2")[failing]
    line = f"error: rank {failing} of 3 on {host}, step 12, data: no such shard"
    assert ended.lines == [(0, line)]
    assert ended.seconds < 15 * busy()


def test_two_ranks_that_fail_at_once_end_with_the_line_of_one(end):
    for _ in range(3):
        ended = end("", "refuses", "refuses too")
        assert ended.codes == [2, 2, 2]
        ((rank, line),) = ended.lines
        assert rank == 0
        assert line.endswith(("data: no such shard", "no such file"))


def test_what_all_ranks_refuse_is_told_as_it_is(end):
    ended = end(others="all refuse")
    assert ended.codes == [2, 2, 2]
    assert ended.lines == [(0, "error: the losses are not finite")]


@pytest.mark.parametrize(
    ("what", "code", "told", "queued"),
    [
        ("storage", 1, "train-0.tar, block 3: the storage fails", True),
        ("weather", 1, "the storage fails: [Errno 116] Stale file handle: 'm.jsonl'", True),
        ("disk is full", 2, "[Errno 28] No space left: 'm.jsonl'", False),
        ("may not write", 2, "[Errno 13] Permission denied: 'm'", False),
        ("is out of memory", 1, "OutOfMemoryError: CUDA out of memory; see ", False),
        ("has a bug", 1, "KeyError: 'missing'; see ", False),
        ("is interrupted", 130, "interrupted", False),
    ],
)
def test_what_an_error_means_to_one_rank_it_means_to_all(end, tmp_path, what, code, told, queued):
    ended = end("", what)
    assert ended.codes == [code] * 3
    ((rank, line),) = ended.lines
    assert rank == 0
    assert line.startswith(f"error: rank 1 of 3 on node1, start: {told}")
    assert (tmp_path / "queued").exists() is queued


def test_the_traceback_of_a_fault_is_in_the_log_of_its_rank(end, tmp_path):
    ended = end("", "", "has a bug")
    ((_, line),) = ended.lines
    log = tmp_path / "logs" / "rank-00002.log"
    assert line.endswith(f"see {log}")
    assert "Traceback" in log.read_text()
    assert 'in <lambda>\n    "has a bug"' in log.read_text()


def test_the_traceback_of_a_fault_without_a_log_is_shown(end, tmp_path):
    (tmp_path / "logs").rmdir()
    ended = end("", "has a bug", traceback=True)
    assert ended.codes == [1, 1, 1]
    assert "Traceback" in ended.outputs[1]
    assert ended.lines == [(0, "error: rank 1 of 3 on node1, start: KeyError: 'missing'")]


def test_a_rank_that_dies_is_named_by_the_first(end, tmp_path):
    ended = end("", "", "dies")
    assert ended.codes == [1, 1, -9]
    ((rank, line),) = ended.lines
    assert rank == 0
    assert line.startswith("error: rank 2 of 3 on node2 is lost: ")
    assert not (tmp_path / "queued").exists()  # what started it has ended the others


def test_two_ranks_that_die_are_named_by_those_that_are_left(end):
    ended = end("", "dies", "dies", world=4)
    assert [ended.codes[0], ended.codes[3]] == [1, 1]
    ((rank, line),) = ended.lines
    assert rank == 0
    assert line.startswith("error: rank 1, 2 of 4 on node1, node2 is lost: ")


@pytest.mark.parametrize("others", ["collective", "device", "python"])
def test_the_first_rank_that_dies_is_named_by_one_of_each_host(end, tmp_path, others):
    ended = end("dies", world=4, others=others)
    assert ended.codes == [-9, 1, 1, 1]
    text = "error: rank 0 of 4 on node1 is lost: it ended, or its host did; the same command goes "
    assert ended.lines == [(r, f"{text}on from the newest checkpoint") for r in (1, 2)]
    assert not (tmp_path / "queued").exists()


@pytest.mark.parametrize("others", ["device", "python"])
@pytest.mark.parametrize("world", [2, 4])
def test_a_launcher_that_ends_is_named_as_that(end, world, others):
    """By the first rank, and where there are several hosts by one of another."""
    ended = end(world=world, others=others, agent=True)
    assert ended.codes == [1] * world
    told = "error: the launcher on node1, by which the ranks meet, is lost: it ended, or its host "
    assert [rank for rank, _ in ended.lines] == ([0, 2] if world == 4 else [0])
    assert all(line.startswith(told) for _, line in ended.lines)


@pytest.mark.parametrize(("hung", "others"), [(0, "collective"), (2, "bookkeeping")])
def test_a_rank_that_hangs_while_its_process_lives_is_named_with_what_it_is_at(end, hung, others):
    does = ["", "", ""]
    does[hung] = "hangs"
    ended = end(*does, timeout=3, others=others)
    assert ended.codes == [1, 1, 1]
    ((rank, line),) = ended.lines
    assert rank == 0
    host = ("node1", "node1", "node2")[hung]
    told = f"error: rank {hung} of 3 on {host} did not answer within 3 s, in data; "
    assert line.startswith(told)


@pytest.mark.parametrize(("stopped", "speaker"), [(0, 1), (1, 0)])
def test_a_process_that_is_stopped_is_named_as_lost(end, stopped, speaker):
    does = ["", "", ""]
    does[stopped] = "is stopped"
    ended = end(*does, timeout=3)
    assert [code for rank, code in enumerate(ended.codes) if rank != stopped] == [1, 1]
    assert ended.lines[0][0] == speaker
    assert all(f"rank {stopped} of 3 on node1 is lost" in line for _, line in ended.lines)


def test_what_the_first_rank_decides_all_know_and_what_it_refuses_is_told_as_it_is(end):
    ended = end(others="decides")
    assert ended.codes == [2, 2, 2]
    assert [output.splitlines()[0] for output in ended.outputs] == [
        json.dumps({"rank": 0, "finished": True})
    ] * 3
    assert ended.lines == [(0, "error: another run")]
