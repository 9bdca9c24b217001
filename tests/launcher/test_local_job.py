import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.fixture
def launch():
    """Run the command line in a process group of its own; whatever is left of it ends here."""
    groups = []

    def run(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "launcher", *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        groups.append(process.pid)
        out, _ = process.communicate()
        assert process.returncode == 0
        return out

    yield run
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


@pytest.mark.distributed
def test_two_local_tasks_train_one_run_and_resume_goes_on(config_file, monkeypatch, launch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(config_file.parent)
    for package in ("shards", "yaml"):  # which are none
        Path(package).mkdir()
    Path("torch.py").write_text("raise SystemExit('run')")
    run = config_file.parent / "runs" / "tiny"

    def metrics_at_the_end():
        deadline = time.monotonic() + 300
        while "RUNNING" in launch("status", run):
            assert time.monotonic() < deadline, launch("logs", run)
            time.sleep(1)
        file = run / "metrics.jsonl"
        assert file.exists(), launch("logs", run)
        return [json.loads(line) for line in file.read_text().splitlines()]

    launch("submit", config_file, "--cluster", "local", "--nodes", 2)
    metrics = metrics_at_the_end()
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert [line["consumed"] for line in metrics] == [8, 16, 24]
    manifest = json.loads((run / "checkpoints/step-00000003/manifest.json").read_text())
    assert manifest["world_size"] == 2
    assert "3/3" in launch("status", run)

    launch("resume", run, "train.steps=4", "--cluster", "local")
    assert [line["step"] for line in metrics_at_the_end()] == [1, 2, 3, 4]
    assert "resuming" in launch("logs", run)
