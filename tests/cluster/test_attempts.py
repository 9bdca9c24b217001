import errno
import json
import os

import pytest

from t5vae.cluster import attempts
from t5vae.common.errors import StorageError, UserError
from tests.failing import failing  # noqa: F401

HOSTS = ("node2", "node1", "node1")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Start attempts of a run in a job, at the step of a checkpoint; each gives its number."""
    newest = 0

    def begin(job=None, step=0):
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        if job:
            monkeypatch.setenv("SLURM_JOB_ID", job)
        nonlocal newest
        newest = max(newest, step)
        return attempts.begin(tmp_path, newest, HOSTS, max_restarts=2)

    begin.file = tmp_path / attempts.ATTEMPTS
    return begin


def test_each_start_is_written_down_with_its_job_hosts_and_step(run):
    assert [run(), run("7"), run("7", step=10)] == [1, 2, 3]
    lines = [json.loads(line) for line in run.file.read_text().splitlines()]
    assert [line["attempt"] for line in lines] == [1, 2, 3]
    assert [line["job"] for line in lines] == [None, "7", "7"]
    assert [line["step"] for line in lines] == [0, 0, 10]
    assert lines[0]["hosts"] == ["node1", "node2"]


def test_a_job_gives_up_after_so_many_restarts_without_a_new_checkpoint(run):
    run("7")
    assert run("7", step=10) == 2
    assert run("7") == 3
    assert run("7") == 4
    before = run.file.read_text()
    for _ in range(2):
        with pytest.raises(UserError, match="job 7 was started 3 times from step 10 and saved"):
            run("7")
    assert run.file.read_text() == before


def test_a_new_checkpoint_a_new_job_or_no_job_counts_from_the_start(run):
    for _ in range(3):
        run("7")
    assert run("7", step=10) == 4
    run("7")
    run("7")
    assert run("8") == 7
    for _ in range(5):
        run()


def test_an_array_task_is_a_job_of_its_own(run, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    run("7")
    assert json.loads(run.file.read_text())["job"] == "5_2"


def test_a_line_that_a_crash_cut_short_is_no_attempt(run):
    run("7")
    run.file.write_text(run.file.read_text() + '{"attempt": 2, "jo')
    assert run("7") == 2
    lines = run.file.read_text().splitlines()
    assert [json.loads(line)["attempt"] for line in lines] == [1, 2]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
@pytest.mark.parametrize("ending", [attempts.ATTEMPTS, ".tmp"])
def test_an_attempt_waits_for_its_storage(run, failing, ending, number):  # noqa: F811
    run()
    failing("open", ending, number, times=2)
    assert run() == 2
    failing("open", ending, number)
    with pytest.raises(StorageError, match=attempts.ATTEMPTS):
        run()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_attempts_that_cannot_be_written_are_for_the_user_to_mend(run, failing, number):  # noqa: F811
    failing("open", ".tmp", number)
    with pytest.raises(UserError, match=f"cannot write .*: {os.strerror(number)}"):
        run()
