import errno
import json
import os
import subprocess
import sys
import time
from typing import ClassVar

import pytest

from t5vae.common.errors import StorageError, UserError
from t5vae.common.quiet import quiet_start
from t5vae.metrics import runlog
from t5vae.metrics.reading import METRICS, read_metrics
from t5vae.metrics.runlog import RunLog


def record(step: int) -> dict:
    return {"step": step, "loss": 1 / step, "mmd": 0.1 + 0.2, "tokens_per_second": 1e4}


class Found:
    """What an evaluation found."""

    figures: ClassVar = {"eval/mmd": 0.5}
    tables: ClassVar = {"samples": [{"text": "x = 1"}]}

    def __str__(self):
        return "mmd 0.5"


FOUND = Found()


@pytest.fixture
def log(make_config):
    """The log of a new run, after steps 1 to 5."""
    config = make_config()
    config.run_dir.mkdir()
    log = RunLog(config, enabled=True)
    for step in range(1, 6):
        log.metrics(record(step))
    yield log
    log.close()


def records(log: RunLog) -> list[dict]:
    """What was read back of `record`, without what every line has besides."""
    lines = read_metrics(log.path.parent)
    return [{name: line[name] for name in record(1)} for line in lines]


def test_metrics_are_read_back_exactly(log):
    assert records(log) == [record(step) for step in range(1, 6)]


def test_a_printed_line_says_the_time_spent_and_left(make_config, monkeypatch, capsys):
    config = make_config(train={"steps": 400, "precision": "fp32"})
    config.run_dir.mkdir()
    clock = iter([1000.0, 1010.0, 1060.0, 8200.0, 8200.0])
    spent = iter([70.0, 120.0, 7260.0, 7260.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(runlog, "process_seconds", lambda: next(spent))
    log = RunLog(config, enabled=True)
    log.start(100, "a run that goes on")
    for step, times in {
        110: "1:10 spent, 4:50 left",
        200: "2:00 spent, 2:00 left",
        300: "2:01:00 spent, 1:00:00 left",
        400: "2:01:00 spent, 0:00 left",
    }.items():
        log.metrics(record(step))
        assert times in capsys.readouterr().err
    log.close()


def test_every_line_says_how_many_steps_there_are_when_it_was_and_what_is_saved(log):
    before = time.time()
    log.saved("saved", step=5, seconds=2.0, stall=0.5)
    log.metrics(record(6))
    log.metrics(record(7))
    *_, fifth, sixth, seventh = read_metrics(log.path.parent)
    assert fifth["checkpoint"] == 0
    assert sixth["checkpoint"] == seventh["checkpoint"] == 5
    assert (sixth["checkpoint_seconds"], sixth["checkpoint_stall"]) == (2.0, 0.5)
    assert "checkpoint_seconds" not in seventh
    assert sixth["steps"] == 10
    assert before <= sixth["time"] <= seventh["time"] <= time.time()


@pytest.mark.parametrize(("step", "left"), [(0, 0), (3, 3), (5, 5), (9, 5)])
def test_lines_past_a_checkpoint_are_dropped(log, step, left):
    log.drop_after(step)
    assert [line["step"] for line in read_metrics(log.path.parent)] == list(range(1, left + 1))
    assert [path.name for path in log.path.parent.iterdir()] == [METRICS]


@pytest.mark.parametrize("half", ['{"step": 6, "lo', '{"step": 6}', "{", "\0\0\0"])
def test_a_half_written_last_line_is_left_out_and_written_anew(log, half):
    with open(log.path, "a") as file:
        file.write(half)
    assert len(read_metrics(log.path.parent)) == 5
    log.drop_after(5)
    log.metrics(record(6))
    lines = log.path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("cut", [True, False])
def test_a_disk_that_is_full_or_fails_costs_no_line(log, monkeypatch, capfd, number, cut):
    class Failing:
        def __init__(self, path, mode):
            self.file = open(path, mode)  # noqa: SIM115 (closed below)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, text):
            self.file.write(text[:7])
            self.file.flush()
            raise OSError(number, os.strerror(number))

    def fail(path, size):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(runlog, "open", Failing, raising=False)
    if not cut:
        monkeypatch.setattr(os, "truncate", fail)
    log.metrics(record(6))
    log.metrics(record(7))
    assert log.path.read_text().count("\n") == 5
    assert log.path.read_text().endswith("\n") == cut
    assert capfd.readouterr().err.count(os.strerror(number)) == 1
    monkeypatch.undo()
    log.metrics(record(8))
    assert log.path.read_text().count("\n") == 8
    assert records(log) == [record(step) for step in range(1, 9)]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC])
@pytest.mark.parametrize("call", ["open", "stat"])
def test_lines_wait_for_storage_and_those_that_never_get_there_are_told(
    log, failing, capfd, monkeypatch, call, number
):
    failing(call, METRICS, number)
    for step in (6, 7, 8):
        log.metrics(record(step))
    assert capfd.readouterr().err.count("waits for") == 1
    log.close()
    assert f"{log.path} lacks the last lines, 3 of them" in capfd.readouterr().err
    monkeypatch.undo()
    log.close()
    assert records(log) == [record(step) for step in range(1, 9)]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
@pytest.mark.parametrize("what", ["metrics", "drop_after"])
def test_metrics_that_may_not_be_written_are_for_the_user_to_mend(log, failing, number, what):
    failing("open", METRICS if what == "metrics" else f"{METRICS}.{os.getpid()}.tmp", number)
    with pytest.raises(UserError, match=f"cannot write .*{METRICS}: {os.strerror(number)}"):
        getattr(log, what)(record(6) if what == "metrics" else 3)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("call", ["open", "rename"])
@pytest.mark.parametrize("times", [2, 10**9])
def test_lines_are_dropped_once_the_storage_answers(log, failing, monkeypatch, call, number, times):
    failing(call, f"{METRICS}.{os.getpid()}.tmp", number, times)
    if times == 2:
        log.drop_after(3)
    else:
        with pytest.raises(StorageError, match=METRICS):
            log.drop_after(3)
    monkeypatch.undo()
    assert records(log) == [record(step) for step in range(1, 4 if times == 2 else 6)]


@pytest.mark.parametrize("line", ['{"loss": 1.0}', '{"step": null}', '{"step": "6"}', "[6]", "6"])
def test_metrics_that_are_damaged_are_told(log, line):
    with open(log.path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=f"{METRICS} is damaged"):
        log.drop_after(3)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize(
    ("call", "ending"), [("mkdir", "samples"), ("open", ".tmp"), ("rename", ".tmp")]
)
def test_texts_that_cannot_be_written_are_a_line(log, failing, capfd, call, ending, number):
    failing(call, ending, number)
    log.step(6, {**record(6), "position": 80}, FOUND, None)
    told = [line for line in capfd.readouterr().err.splitlines() if "texts of step 6" in line]
    assert len(told) == 1
    assert os.strerror(number) in told[0]
    assert records(log)[-1] == record(6)


def test_a_run_without_metrics_has_nothing_to_drop(make_config):
    config = make_config()
    config.run_dir.mkdir()
    RunLog(config, enabled=True).drop_after(0)
    assert not (config.run_dir / METRICS).exists()


def test_a_figure_that_is_no_number_leaves_the_line_valid_json(log):
    log.metrics({**record(6), "grad_norm": float("nan")})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    last = log.path.read_text().splitlines()[-1]
    assert json.loads(last, parse_constant=refuse)["step"] == 6


def test_other_ranks_are_silent(make_config, capfd):
    config = make_config()
    config.run_dir.mkdir()
    log = RunLog(config, enabled=False)
    log.metrics(record(1))
    log.say("something")
    log.drop_after(0)
    log.start(8, "a run that goes on")
    assert list(log.steps(8)) == [9, 10]
    log.step(9, {"loss": 1.0, "position": 128}, FOUND, "an event")
    log.saved("saved", step=9, seconds=2.0, stall=0.5)
    log.stopped(9, "told to stop")
    log.close()
    assert capfd.readouterr() == ("", "")
    assert list(config.run_dir.iterdir()) == []


def test_a_line_is_said_as_it_is_brackets_and_all(make_config, capsys):
    config = make_config()
    text = "saved runs/[red]/[/b]/step-00000001 [Errno 28]"
    RunLog(config, enabled=True).say(text)
    assert capsys.readouterr().err == text + "\n"


def test_each_logged_step_is_one_line_for_people(log, capsys):
    lines = []
    for step in (6, 7):
        log.metrics(record(step))
        lines += capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].split()[:4] == ["step", "6/10", "loss", "0.167"]


def test_steps_are_counted_from_the_one_after_those_done_to_the_last(log):
    assert list(log.steps(5)) == [6, 7, 8, 9, 10]
    assert list(log.steps(10)) == []
    log.start(10, "a run that is done")
    log.metrics(record(10))
    assert read_metrics(log.path.parent)[-1]["checkpoint"] == 10


def test_a_step_is_written_and_told_with_what_was_found_and_what_went_wrong(log, capsys):
    log.step(6, {"loss": 1.0, "position": 80}, None, None)
    log.step(7, {"loss": 2.0, "position": 1096}, FOUND, "a spike")
    *_, sixth, seventh = read_metrics(log.path.parent)
    common = {"steps", "time", "checkpoint"}
    assert {k: v for k, v in sixth.items() if k not in common} == {"step": 6, "loss": 1.0}
    assert {k: v for k, v in seventh.items() if k not in common} == {
        "step": 7,
        "loss": 2.0,
        "eval/mmd": 0.5,
        "event": "a spike",
        "position": 1096,
    }
    assert capsys.readouterr().err.splitlines()[2:] == [
        "step 7: mmd 0.5",
        "step 7: a spike (the batch from position 1,096)",
    ]
    written = json.loads((log.path.parent / "samples/step-00000007.json").read_text())
    assert written == {"step": 7, **FOUND.tables}


def test_a_run_that_is_stopped_says_why_and_where(log, capsys):
    log.stopped(1234, "told to stop")
    said = "told to stop: saved at step 1,234; the same command goes on from there\n"
    assert capsys.readouterr().err == said


def test_a_run_whose_lines_nobody_reads_any_more_goes_on(log, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        for step in (6, 7):
            log.metrics(record(step))
            log.say("one more line")
    assert [line["step"] for line in records(log)] == [1, 2, 3, 4, 5, 6, 7]


def test_what_libraries_print_at_the_start_goes_to_a_file_and_what_follows_does_not(tmp_path):
    file = tmp_path / "rank-00000.log"
    file.write_text("an earlier start\n")
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from t5vae.common.quiet import quiet_start\n"
        f"with quiet_start(Path({str(file)!r})):\n"
        "    print('from python'); os.write(2, b'from c++\\n')\n"
        "print('after'); print('after', file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("after\n", "after\n")
    written = file.read_text()
    assert written.startswith("an earlier start\n")
    assert "from python" in written
    assert "from c++" in written


def test_an_error_at_the_start_is_raised_and_the_terminal_given_back(tmp_path, capfd):
    with pytest.raises(ValueError, match="inside"), quiet_start(tmp_path / "log"):
        raise ValueError("inside")
    os.write(2, b"seen\n")
    assert capfd.readouterr().err == "seen\n"


def test_an_attempt_is_told_where_it_is_not_the_only_one(log, capfd, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    log.attempt(1, None)
    assert capfd.readouterr().err == ""
    log.attempt(2, None)
    assert capfd.readouterr().err == "attempt 2\n"
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    log.attempt(1, "2 ranks on 2 hosts")
    assert capfd.readouterr().err == "attempt 1, job 77\n2 ranks on 2 hosts\n"
