"""The soak of kills: its plan and its bookkeeping; and a short one, itself killed in the middle."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from tests.launching import small_config, wait_until
from tests.soak.kills import Soak, UnmetError
from tests.soak.reads import Reads, is_cut_short, lines, served
from tests.soak.rounds import EVERY, MOMENTS, draw_round
from tests.soak.summary import summary

SEEDS = range(20)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_round_has_other_ranks_than_the_one_before_and_a_kill_at_each_kind_of_moment(seed):
    rounds = [draw_round(seed, number) for number in range(25)]
    assert rounds == [draw_round(seed, number) for number in range(25)]
    for before, after in pairwise(rounds):
        assert before.world != after.world
    for each in rounds:
        assert each.launcher != "slurm" or each.world in (2, 3)
        assert sorted(kill.moment for kill in each.kills) == sorted(MOMENTS)
        assert all(kill.rank < each.world and kill.pauses < each.world for kill in each.kills)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_hundred_kills_are_shared_by_launchers_and_victims(seed):
    rounds = [draw_round(seed, number) for number in range(25)]
    launchers = Counter(each.launcher for each in rounds for _ in each.kills)
    victims = Counter(kill.victim for each in rounds for kill in each.kills)
    assert min(launchers["deepspeed"], launchers["slurm"]) >= 20
    assert victims["host"] >= 8
    assert victims["launcher"] >= 8
    assert len({each.world for each in rounds}) == 3
    assert {each.asynchronous for each in rounds} == {each.is_killed for each in rounds}


class Silent(Reads):
    """Ranks that print nothing."""

    def output(self) -> str:
        return ""


def attempt(folder: Path, reads: dict[int, list[list]]) -> Silent:
    """One whose ranks read these steps' sequences."""
    folder.mkdir()
    for rank, steps in reads.items():
        text = [json.dumps({"step": step, "sequences": read}) for step, read in steps]
        (folder / f"sequences-{rank}.jsonl").write_text("\n".join([*text, '{"step": 9, "seq']))
    return Silent(3, folder)


def test_a_step_that_was_done_again_counts_as_done_last(tmp_path):
    attempts = [
        attempt(tmp_path / "0", {0: [[1, [1]], [2, [3]], [3, [5]]], 1: [[1, [2]], [2, [4]]]}),
        attempt(tmp_path / "1", {}),
        attempt(tmp_path / "2", {0: [[2, [3, 4]]]}),
    ]
    assert [each.first for each in attempts] == [1, None, 2]
    assert served(attempts) == {1: {0: [1], 1: [2]}, 2: {0: [3, 4]}}


def test_a_step_may_lack_its_evaluation_and_nothing_else():
    whole = {"step": 3, "loss": 1.5, "eval/exact_match": 0.5}

    def cut(**line):
        return is_cut_short(json.dumps(line), json.dumps(whole))

    assert cut(step=3, loss=1.5)
    assert not cut(step=3, loss=1.6)
    assert not cut(step=3)


@pytest.fixture
def soak(tmp_path) -> Soak:
    """One that has killed its run at step 20, which is about to go on."""
    small_config(tmp_path, tmp_path / "none")
    (tmp_path / "kills.jsonl").write_text('{"seed": 1}\n{"kill": 1, "ro')
    begun = Soak(tmp_path, fork=None)
    begun.pending = [{"step": 20, "most": EVERY, "victim": "host", "moment": "starting"}]
    return begun


def test_a_kill_is_written_once_the_run_has_gone_on(soak, tmp_path):
    soak.resolve(attempt(tmp_path / "0", {}))
    assert soak.kills() == []
    soak.resolve(attempt(tmp_path / "1", {0: [[19, [1]], [20, [2]]]}))
    (line,) = soak.kills()
    assert (line["kill"], line["resumed"], line["lost"]) == (1, 18, 2)
    assert soak.pending == []


@pytest.mark.parametrize("goes_on_after", [20 - EVERY - 1, 21])
def test_a_kill_that_costs_more_than_it_may_or_less_than_nothing_is_refused(
    soak, tmp_path, goes_on_after
):
    with pytest.raises(UnmetError, match=f"at step 20, goes on after step {goes_on_after}"):
        soak.resolve(attempt(tmp_path / "0", {0: [[goes_on_after + 1, [1]]]}))
    (line,) = soak.kills()
    assert line["verdict"] == "LOST"


def test_a_soak_that_failed_does_not_go_on(soak, tmp_path):
    soak.write(verdict="failed", why="a step differs")
    with pytest.raises(UnmetError, match="ends with a failure"):
        Soak(tmp_path, fork=None)


@pytest.mark.parametrize(("steps", "fails"), [([1, 2, 3], False), ([1, 3], True), ([1, 1], True)])
def test_a_step_that_is_missing_or_twice_in_the_metrics_is_found(soak, steps, fails):
    soak.run.mkdir()
    text = "".join(json.dumps({"step": step}) + "\n" for step in steps)
    (soak.run / "metrics.jsonl").write_text(text)
    if fails:
        with pytest.raises(UnmetError):
            soak.check_files()
    else:
        soak.check_files()


@pytest.mark.soak
@pytest.mark.distributed
def test_a_soak_that_is_killed_itself_goes_on_where_it_was(tmp_path):
    log, out = tmp_path / "kills.jsonl", tmp_path / "out"
    command = [sys.executable, "-m", "tests.soak.kills", "--kills", "4", str(tmp_path)]
    root = Path(__file__).parents[2]

    class Program:
        process = subprocess.Popen(command, cwd=root, stdout=out.open("w"), stderr=out.open("a"))

        def is_alive(self) -> bool:
            return self.process.poll() is None

        def output(self) -> str:
            return out.read_text()

    wait_until(lambda: any("kill" in line for line in lines(log)), Program())
    os.kill(Program.process.pid, signal.SIGKILL)
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, first, last = lines(log)
    assert [line["kill"] for line in lines(log) if "kill" in line] == [1, 2, 3, 4]
    assert first["kill"] == 4
    assert last["verdict"] == "bit-equal"
    assert summary(tmp_path) in done.stdout
