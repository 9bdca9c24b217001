"""Reasons to stop, without a run: signals, and the end of what started this process."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from t5vae.cluster.scheduler import queue_again, requeue_job
from t5vae.cluster.stopping import StopRequest


def told(*numbers: int) -> StopRequest:
    """A request after these signals reached this process."""
    stop = StopRequest()
    stop.install()
    for number in numbers:
        os.kill(os.getpid(), number)
    return stop


@pytest.mark.parametrize(
    ("numbers", "requested", "requeue"),
    [
        ((), False, False),
        ((signal.SIGTERM,), True, False),
        ((signal.SIGINT,), True, False),
        ((signal.SIGUSR2,), True, True),
        ((signal.SIGTERM, signal.SIGTERM), True, False),
        ((signal.SIGUSR2, signal.SIGUSR2), True, True),
    ],
)
def test_signals_set_flags_and_end_nothing(numbers, requested, requeue):
    stop = told(*numbers)
    assert stop.requested is requested
    assert stop.requeue is requeue


def test_a_second_interrupt_ends_the_process_at_once():
    with pytest.raises(SystemExit) as caught:
        told(signal.SIGINT, signal.SIGINT)
    assert caught.value.code == 130


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR2])
def test_a_first_interrupt_after_another_signal_still_lets_the_run_save(first):
    assert told(first, signal.SIGINT).requested


def test_a_handler_that_was_there_before_is_replaced():
    def launchers_own(number, frame):
        raise AssertionError("the launcher's handler ran")

    signal.signal(signal.SIGUSR2, launchers_own)
    assert told(signal.SIGUSR2).requeue


# DeepSpeed's processes by their command lines: the runner starts a launch process, that a rank.
# Real ones, which take ten seconds to start, are in test_runs.py.

START = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *{arguments}]))"
RANK = """
import sys
from t5vae.cluster.stopping import StopRequest

stop = StopRequest()
stop.install()
for _ in sys.stdin:
    print(stop.requested, stop.reason, sep=": ", flush=True)
"""
GOES_ON, ENDS = "False: told to stop", "True: the deepspeed process that started this run has ended"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder with `deepspeed`, which starts a rank by a launch process."""
    files = {
        "rank.py": RANK,
        "deepspeed": START.format(arguments=["-m", "deepspeed.launcher.launch"]),
        "package/deepspeed/__init__.py": "",
        "package/deepspeed/launcher/launch.py": START.format(arguments=[str(tmp_path / "rank.py")]),
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "package"), prepend=":")
    return tmp_path


class Asked:
    """A rank that says whether it would stop, below the process that was started."""

    def __init__(self, process: subprocess.Popen):
        self.process = process

    def says(self) -> str:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@contextlib.contextmanager
def started(*command: str | Path) -> Iterator[Asked]:
    """Ends with the rank, whose input is closed; whoever is above it ends then."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(list(map(str, command)), text=True, start_new_session=True, **pipes)
    asked = Asked(process)
    try:
        assert asked.says() == GOES_ON
        yield asked
    finally:
        process.stdin.close()
        process.stdout.read()  # until the last that could write has ended
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ranks_whose_deepspeed_runner_ended_are_to_stop(tree, number):
    with started(sys.executable, tree / "deepspeed") as rank:
        rank.process.send_signal(number)
        os.waitid(os.P_PID, rank.process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
        assert rank.says() == ENDS
        assert rank.says() == ENDS


def test_a_runner_may_lose_its_shell(tree):
    runner = f"{sys.executable} {tree / 'deepspeed'}"
    with started("sh", "-c", f"exec 3<&0; {runner} <&3 & wait") as rank:
        (child,) = psutil.Process(rank.process.pid).children()
        rank.process.kill()
        rank.process.wait()
        assert rank.says() == GOES_ON
        child.kill()
        child.wait()
        assert rank.says() == ENDS


def test_without_a_runner_as_under_pdsh_ranks_lose_what_started_them_and_go_on(tree):
    launch = f"{sys.executable} -m deepspeed.launcher.launch"
    with started("sh", "-c", f"exec 3<&0; {launch} <&3 & wait") as rank:
        rank.process.kill()
        rank.process.wait()
        assert rank.says() == GOES_ON


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stand-in that writes down how it was called."""
    command, calls = tmp_path / "scontrol", tmp_path / "calls"
    command.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return calls


def test_a_job_is_requeued_by_its_number(scontrol, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert requeue_job()
    assert scontrol.read_text() == "requeue 77\n"


def test_outside_a_job_nothing_is_requeued(scontrol, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert not requeue_job()
    assert not scontrol.exists()


def test_where_slurm_has_no_commands_nothing_is_requeued(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not requeue_job()


def test_a_refusal_of_slurm_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    command = tmp_path / "scontrol"
    command.write_text("#!/bin/sh\necho 'Requested operation\nis disabled' >&2; exit 1\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert not requeue_job()
    line = "job 77 is not queued again: Requested operation is disabled\n"
    assert capsys.readouterr().err == line


def test_a_job_in_a_container_asks_by_its_exit_code(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with pytest.raises(SystemExit) as ended:
        queue_again()
    assert ended.value.code == 75


def test_a_job_that_slurm_takes_back_ends_well(scontrol, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    queue_again()
    assert scontrol.read_text() == "requeue 77\n"


def test_outside_a_job_nobody_is_asked(scontrol, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    queue_again()
    assert not scontrol.exists()


def test_a_task_of_an_array_is_requeued_alone(scontrol, monkeypatch):
    for name, value in {"JOB_ID": "78", "ARRAY_JOB_ID": "77", "ARRAY_TASK_ID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert requeue_job()
    assert scontrol.read_text() == "requeue 77_1\n"
