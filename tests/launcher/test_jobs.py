import errno
import fcntl
import json
import re
import shutil

import pytest

from t5vae.cluster.attempts import begin
from t5vae.cluster.run_folder import lock_run
from tests.weather import without_locks


def test_status_logs_and_cancel_find_a_job_by_run_or_id(config_file, slurm, launch):
    launch("submit", config_file)
    assert re.search(r"^77 +ENDED ", launch("status")[1], re.M)
    slurm("squeue", "echo '77|RUNNING|node1|1|59:00|None'")
    assert re.search(r"^77 +RUNNING +node1 ", launch("status", "runs/tiny")[1], re.M)
    assert launch("logs", "77")[0] == 2
    (config_file.parent / "runs/tiny/jobs/77_0_log.out").write_text("a line\n")
    assert launch("logs", "77")[1] == "a line\n"
    slurm("scancel", "echo $@ > cancelled")
    assert launch("cancel", "runs/tiny")[0] == 0
    assert (config_file.parent / "cancelled").read_text() == "77\n"
    code, _, err = launch("logs", "78")
    assert code == 2
    assert "no job 78" in err


def test_the_newest_job_is_the_last_one_submitted_whatever_its_number(config_file, slurm, launch):
    launch("submit", config_file)
    old = config_file.parent / "runs/tiny/jobs/77.json"
    record = json.loads(old.read_text()) | {"time": "2026-01-01T12:00:00+09:00"}
    old.write_text(json.dumps(record) + "\n")
    slurm("sbatch", "echo Submitted batch job 8")  # a counter that began anew
    launch("submit", config_file)
    assert [line.split()[0] for line in launch("status")[1].splitlines()] == ["job", "77", "8"]
    slurm("squeue", "echo '8|RUNNING|node1|1|59:00|None'")
    slurm("scancel", "echo $@ > cancelled")
    assert launch("cancel", "runs/tiny")[0] == 0
    assert (config_file.parent / "cancelled").read_text() == "8\n"


def test_status_does_not_call_a_job_ended_when_slurm_is_silent(config_file, slurm, launch):
    launch("submit", config_file)
    slurm("squeue", "echo Unable to contact slurm controller >&2; exit 1")
    code, _, err = launch("status")
    assert code == 2
    assert "Unable to contact" in err


def test_a_run_that_a_live_job_holds_is_refused_unless_it_is_to_wait(config_file, slurm, launch):
    launch("submit", config_file)
    slurm("squeue", "echo '77|PENDING||1|1:00|Priority'")
    code, _, err = launch("submit", config_file)
    assert code == 2
    assert "runs/tiny is held by job 77" in err
    assert launch("resume", "runs/tiny")[0] == 2

    slurm("sbatch", "cat $1 > script; echo Submitted batch job 78")
    assert launch("submit", config_file, "--force")[0] == 0
    assert "#SBATCH --dependency=afterany:77\n" in (config_file.parent / "script").read_text()


@pytest.mark.parametrize("plain", [False, True], ids=["submit", "sbatch"])
def test_a_copy_is_not_held_by_its_originals_jobs_and_only_the_original_ends_them(
    config_file, slurm, launch, plain, monkeypatch
):
    run = config_file.parent / "runs/tiny"
    if plain:
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        run.mkdir(parents=True)
        shutil.copy(config_file, run / "config.yaml")
        lock_run(run).close()
        begin(run, 0, ("node1",), max_restarts=3)
        monkeypatch.delenv("SLURM_JOB_ID")
    else:
        launch("submit", config_file)
    slurm("squeue", "echo '77|RUNNING|node1|1|59:00|None'")
    slurm("scancel", "echo $@ > cancelled")
    slurm("sbatch", "echo Submitted batch job 78")
    copy = shutil.copytree(run, run.with_name("copy"))
    code, _, err = launch("cancel", "runs/copy")
    assert code == 2
    assert "runs/copy is a copy, and job 77 its original's" in err
    assert launch("submit", config_file)[0] == 2
    assert launch("submit", config_file, "run.output_dir=runs/copy")[0] == 0
    assert launch("status", "runs/copy")[1].splitlines()[-1].startswith("78 ")
    shutil.rmtree(copy)
    moved = run.rename(run.with_name("moved"))
    assert " RUNNING " in launch("status", "runs/moved")[1]
    code, _, err = launch("cancel", "runs/moved")
    assert code == 2
    assert "runs/moved was moved, or handed over, since it named job 77" in err
    assert not (config_file.parent / "cancelled").exists()
    moved.rename(run)
    assert launch("cancel", "runs/tiny")[0] == 0
    assert (config_file.parent / "cancelled").read_text() == "77\n"


def test_a_run_that_plain_sbatch_trains_is_held_and_shown_too(config_file, slurm, launch):
    run = config_file.parent / "runs/tiny"
    run.mkdir(parents=True)
    (run / ".lock").write_text('{"job": "90", "host": "node1", "token": "a"}\n')
    slurm("squeue", "echo '90|RUNNING|node1|1|59:00|None'")
    code, _, err = launch("submit", config_file)
    assert code == 2
    assert "held by job 90" in err
    attempt = {"attempt": 1, "job": "90", "step": 0, "time": "2026-01-01T12:00:00+0000"}
    (run / "attempts.jsonl").write_text(json.dumps(attempt) + "\n")
    assert re.search(r"^90 +RUNNING +node1 .* 0 +59:00 +runs/tiny$", launch("status")[1], re.M)
    (config_file.parent / "slurm-90.out").write_text("step 1\n")
    assert launch("logs", "90")[1] == "step 1\n"


def test_a_run_that_a_process_trains_is_refused(config_file, slurm, launch):
    run = config_file.parent / "runs/tiny"
    run.mkdir(parents=True)
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = launch("submit", config_file)
    assert code == 2
    assert "another process is training in runs/tiny" in err
    assert launch("submit", config_file)[0] == 0


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_run_folder_without_locks_holds_up_no_job(
    config_file, slurm, launch, monkeypatch, number
):
    run = config_file.parent / "runs/tiny"
    run.mkdir(parents=True)
    (run / ".lock").write_text("")
    without_locks(monkeypatch, number)
    assert launch("submit", config_file)[0] == 0


def test_status_shows_how_far_a_run_is(config_file, slurm, launch):
    launch("submit", config_file)
    run = config_file.parent / "runs/tiny"
    step = {"step": 2, "loss": 1.25, "tokens_per_second": 12345.6}
    (run / "metrics.jsonl").write_text(json.dumps(step) + '\n{"step": 3, "lo')
    (run / "checkpoints/step-00000002").mkdir(parents=True)
    attempts = [{"attempt": n, "job": "77", "step": 0} for n in (1, 2, 3)]
    (run / "attempts.jsonl").write_text("".join(json.dumps(a) + "\n" for a in attempts))
    slurm("squeue", "echo '77|RUNNING|node[1-2]|2|1-02:03:04|None'")
    heading, row = launch("status")[1].splitlines()
    assert heading.split() == [
        *("job", "state", "nodes", "step", "loss", "tokens/s", "checkpoint", "restarts", "left"),
        *("run", "reason"),
    ]
    cells = re.split(r" {2,}", row)
    checkpoint = cells.pop(6)
    assert re.fullmatch(r"2, \d+ s ago", checkpoint)
    assert cells == [
        *("77", "RUNNING", "node[1-2]", "2/3", "1.2500", "12,346", "2", "1-02:03:04", "runs/tiny")
    ]
    slurm("squeue", "echo '77|PENDING|node[1-2]|2|1:00:00|Resources'")
    assert re.search(r"^77 +PENDING +2 .* runs/tiny +Resources$", launch("status")[1], re.M)


def test_a_job_that_slurm_forgot_is_asked_of_its_accounts_then_told_from_the_run(
    config_file, slurm, launch
):
    launch("submit", config_file)
    run = config_file.parent / "runs/tiny"
    slurm("sacct", "echo accounting is disabled >&2; exit 1")
    assert re.search(r"^77 +ENDED ", launch("status")[1], re.M)
    done = {"step": 3, "loss": None, "tokens_per_second": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(done) + "\n")
    assert re.search(r"^77 +COMPLETED +- +3/3 +- ", launch("status")[1], re.M)
    slurm("sacct", "echo '77|CANCELLED by 0|node1'")
    assert re.search(r"^77 +CANCELLED +node1 ", launch("status")[1], re.M)
    code, _, err = launch("cancel", "77")
    assert code == 2
    assert "has ended already" in err


@pytest.mark.parametrize("name", ["jobs/77.json", "attempts.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"{]\n", b"\xff\x00\xfe\n", b"7\n"])
def test_a_damaged_file_of_a_run_is_one_line_that_names_it(
    config_file, slurm, launch, name, content
):
    launch("submit", config_file)
    (config_file.parent / "runs/tiny" / name).write_bytes(content)
    code, out, err = launch("status")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"runs/tiny/{name} is damaged" in err


def test_status_shows_runs_whose_configuration_it_cannot_read(config_file, slurm, launch):
    launch("submit", config_file)
    run = config_file.parent / "runs/tiny"
    (run / "config.yaml").write_bytes(b"\xff\x00")
    step = {"step": 2, "loss": 1.25, "tokens_per_second": 12345.6}
    (run / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    assert re.search(r"^77 +ENDED +- +2/\? ", launch("status")[1], re.M)
