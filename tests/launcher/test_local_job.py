import json
import subprocess
import sys
import time

import pytest


def launch(*arguments):
    command = [sys.executable, "-m", "launcher", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def wait_for_end(run):
    deadline = time.monotonic() + 200
    while "ENDED" not in launch("status", run):
        assert time.monotonic() < deadline, launch("logs", run)
        time.sleep(1)


@pytest.mark.distributed
def test_two_local_tasks_train_one_run_and_resume_goes_on(config_file, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = config_file.parent / "runs" / "tiny"
    launch("submit", config_file, "--cluster", "local", "--nodes", 2)
    wait_for_end(run)
    log = launch("logs", run)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3], log
    assert [line["consumed"] for line in metrics] == [8, 16, 24]
    checkpoint = run / "checkpoints" / "step-00000003"
    assert json.loads((checkpoint / "manifest.json").read_text())["world_size"] == 2
    assert "3/3" in launch("status", run)
    assert launch("logs", run, "--rank", 1) is not None

    launch("resume", run, "train.steps=4", "--cluster", "local")
    wait_for_end(run)
    metrics = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [1, 2, 3, 4], launch("logs", run)
