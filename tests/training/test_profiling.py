import gzip
import json
import time

import pytest
import torch
from torch.profiler import record_function as phase

from t5vae.training import profiling
from t5vae.training.profiling import Profiler


@pytest.fixture
def folder(tmp_path):
    """A run's."""
    (tmp_path / "logs").mkdir()
    return tmp_path


@pytest.fixture
def profiled(folder):
    """Steps with a matrix product and a wait; what was told, and the folder of the profile."""

    def run(first: int, last: int, *, start: int = 0, end: int = 6):
        told: list[str] = []
        profiler = Profiler((first, last), folder, 0, told.append)
        for step in range(start + 1, end + 1):
            profiler.before(step)
            with phase("data"):
                time.sleep(0.02)
            with phase("forward"):
                torch.ones(300, 300) @ torch.ones(300, 300)
        profiler.close()
        return told, folder / "profile"

    return run


@pytest.mark.parametrize(
    ("first", "last", "start", "end", "seen"),
    [(2, 3, 0, 6, (2, 3)), (1, 1, 0, 6, (1, 1)), (2, 5, 3, 6, (4, 5)), (5, 9, 0, 6, (5, 6))],
)
def test_the_steps_that_were_asked_for_are_profiled(profiled, first, last, start, end, seen):
    told, folder = profiled(first, last, start=start, end=end)
    assert told == [f"profiled steps {seen[0]} to {seen[1]}: {folder}/steps.txt"]
    with gzip.open(folder / "rank-00000.trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("forward") == seen[1] - seen[0] + 1
    assert "aten::mm" in names


def test_the_table_says_where_a_steps_time_goes(profiled):
    _, folder = profiled(2, 4)
    lines = (folder / "steps.txt").read_text().splitlines()
    assert lines[0].startswith("steps 2 to 4: ")
    whole = float(lines[0].split()[4])
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:6]}
    assert list(rows) == ["data", "forward", "other"]
    spent = {name: float(milliseconds) for name, (milliseconds, _) in rows.items()}
    assert sum(spent.values()) == pytest.approx(whole, abs=0.05)
    assert 20 <= spent["data"] <= whole
    shares = [float(share.rstrip("%")) for _, share in rows.values()]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    operators = [line.split()[0] for line in lines[8:]]
    assert "aten::mm" in operators
    assert not set(profiling.phases()) & set(operators)
    mm = next(line.split() for line in lines if line.startswith("aten::mm "))
    assert float(mm[1]) == 1  # a step


def test_steps_that_never_come_and_no_profile_write_nothing(profiled, tmp_path):
    told, folder = profiled(8, 9)
    assert told == []
    assert not folder.exists()
    profiler = Profiler(None, tmp_path, 0, told.append)
    for step in (1, 2, 3):
        profiler.before(step)
    profiler.close()
    assert told == []
    assert not folder.exists()


def test_a_profile_that_cannot_be_written_stops_nothing(folder):
    (folder / "profile").write_text("in the way")
    told: list[str] = []
    profiler = Profiler((1, 2), folder, 0, told.append)
    for step in (1, 2, 3, 4):
        profiler.before(step)
    assert len(told) == 1
    assert told[0].startswith("the profile could not be written: ")
