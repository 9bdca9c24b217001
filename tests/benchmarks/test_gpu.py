"""`benchmarks/gpu.py`: how it shares its minutes and survives its sections; all of them, small."""

import gzip
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAKES = "tests.benchmarks.fake_sections"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT))  # `shards` is the package
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import gpu
    from _gpu_worker import TESTS

    for folder in TESTS:
        monkeypatch.syspath_prepend(folder)
    return gpu


@pytest.fixture
def call(gpu, monkeypatch, tmp_path):
    """Carries out fake sections; the page."""

    def carry_out(stages, seconds=60.0, grace=5.0, only=None):
        names = [name for lanes in stages.values() for lane in lanes for name in lane]
        sections = {name: gpu.Section(f"The {name} one", FAKES, 10) for name in names}
        monkeypatch.setattr(gpu, "SECTIONS", sections)
        monkeypatch.setattr(gpu, "STAGES", stages)
        monkeypatch.setattr(gpu, "GRACE", grace)
        board = gpu.Board(tmp_path / "out")
        board.out.mkdir(exist_ok=True)
        one = gpu.Call(tmp_path, tmp_path / "scratch", smoke=False, board=board)
        one.run(only or names, time.time() + seconds)
        assert all(worker.process.returncode is not None for worker in one.workers)
        return board, (board.out / "gpu.md").read_text()

    return carry_out


def test_a_section_that_fails_is_told_and_the_next_ones_run(call):
    stages = {"One": (("good", "raises", "dies"), ("after",)), "Two": (("after",),)}
    board, page = call(stages)
    assert sorted(board.failed) == ["dies", "raises"]
    assert "**Failed: ValueError: a fault.**\n\nhalf of it" in page
    assert "**Failed: its process ended.**\n\nbefore its end" in page
    assert page.count("it had some time, in cpu") == 2
    assert "a table" in page
    assert "a first table" not in page
    assert "| a ratio | at least 2.000 | 3.000 | met |" in page


def test_a_section_whose_time_is_over_is_cut_and_leaves_the_others_theirs(call):
    began = time.time()
    board, page = call({"One": (("hangs", "after"),)}, seconds=16, grace=0)
    assert time.time() - began < 30
    assert board.failed == []
    assert "**Cut: its time was over.**\n\nwhat came in time" in page
    assert "it had some time" in page


def test_a_later_call_renews_its_sections_and_keeps_the_others(call):
    stages = {"One": (("good", "after"),)}
    call(stages)
    _, page = call(stages, only=["after"])
    assert page.count("a table") == 1
    assert page.count("it had some time") == 1


def test_time_that_one_section_leaves_over_the_next_ones_have(gpu):
    end = time.time() + 90
    assert gpu.share(end, [10, 20]) == pytest.approx(30, abs=0.1)
    assert gpu.share(end, [20]) == pytest.approx(90, abs=0.1)
    assert gpu.share(time.time() - 1, [10, 20]) == 0


def test_every_section_is_in_one_lane_and_has_a_function(gpu):
    lanes = [name for lanes in gpu.STAGES.values() for lane in lanes for name in lane]
    assert sorted(lanes) == sorted(gpu.SECTIONS)
    for name, section in gpu.SECTIONS.items():
        assert f"def {name}(bench: Bench)" in (ROOT / f"benchmarks/{section.module}.py").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--only", "nothing"), "--only nothing: choose from errors,"),
        (("--minutes", "0"), "--minutes 0: give more than 0"),
        (("--minutes", "inf"), "--minutes inf: give more than 0"),
        (("--prepare", "--data", "/dev/null/x"), "Not a directory: '/dev/null/x'"),
        (("--data", "nowhere"), "nothing is prepared in nowhere: use --prepare --data nowhere"),
    ],
)
def test_a_mistake_is_one_line(arguments, said, tmp_path):
    command = [sys.executable, ROOT / "benchmarks/gpu.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]


def test_the_device_is_busy_where_any_kernel_or_copy_runs(gpu, tmp_path):
    import _gpu_step

    spans = {"kernel": [(0, 4), (2, 2), (10, 1)], "gpu_memcpy": [(3, 3)], "cpu_op": [(20, 5)]}
    events = [{"cat": kind, "ts": ts, "dur": dur} for kind, own in spans.items() for ts, dur in own]
    trace = tmp_path / "trace.json.gz"
    trace.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert _gpu_step.busy_seconds(trace) == pytest.approx(7e-6)


def test_reads_of_the_host_are_counted_by_place(gpu, monkeypatch):
    import _gpu_correct
    import torch

    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    found = _gpu_correct.Counter()
    with _gpu_correct.host_reads(found):
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert modes == ["warn", "default"]
    ((place, count),) = found.items()
    assert place.startswith("tests/benchmarks/test_gpu.py:")
    assert count == 3


@pytest.mark.soak
def test_all_of_it_runs_at_toy_size(gpu, tmp_path):
    command = [sys.executable, ROOT / "benchmarks/gpu.py", "--smoke", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in gpu.SECTIONS:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["ended"] == "whole"
        assert found["parts"]
        if name in {name for lane in gpu.STAGES["Correct"] for name in lane}:
            targets = [gpu.Target(*t) for part in found["parts"].values() for t in part["targets"]]
            assert targets
            assert all(target.is_met for target in targets), done.stdout
