"""What SLURM is handed: an environment of no other job, and nothing that it would act on badly."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from launcher.slurm import FORGET
from launcher.task import Training
from t5vae.config import load_config

OUTER = {
    "SLURM_MEM_PER_CPU": "100",
    "SLURM_MEM_PER_NODE": "200",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_GPUS_PER_NODE": "4",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_CPUS_PER_TASK": "2",
    "SLURM_TRES_PER_TASK": "cpu:2",
    "SLURM_CPU_BIND": "mask",
    "SLURM_JOB_ID": "5",
    "SLURM_ARRAY_JOB_ID": "5",
    "SLURM_ARRAY_TASK_ID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_EXPORT_ENV": "NONE",
}
KEPT = {
    "SLURM_CONF": "/etc/slurm/slurm.conf",
    "SLURM_CLUSTERS": "alpha",
    "SLURM_TIME_FORMAT": "relative",
    "SLURM_MPI_TYPE": "none",
    "SBATCH_ACCOUNT": "mine",
}


@pytest.fixture
def queued(config_file, slurm, monkeypatch):
    """The environment that sbatch was run in, from inside a job."""
    for name, value in {**OUTER, **KEPT}.items():
        monkeypatch.setenv(name, value)
    slurm("sbatch", "env > environment; echo Submitted batch job 77")

    def read():
        lines = (config_file.parent / "environment").read_text().splitlines()
        return dict(line.partition("=")[::2] for line in lines)

    return read


def test_a_job_is_queued_as_from_outside_of_every_job(config_file, launch, queued):
    assert launch("submit", config_file)[0] == 0
    assert not set(OUTER) & set(queued())
    assert KEPT.items() <= queued().items()
    assert OUTER.items() <= os.environ.items()  # of this process


def test_a_job_that_queues_its_successor_knows_its_own_number(config_file, queued):
    run = config_file.parent / "runs/tiny"
    run.mkdir(parents=True)
    Training(load_config(config_file), "slurm")._queue_without(["node2"])
    assert not set(OUTER) & set(queued())
    script = (run / "jobs/77_submission.sh").read_text()
    assert "#SBATCH --dependency=afterany:5_1\n" in script


def test_the_submitted_script_forgets_what_train_sh_does(config_file, slurm, launch):
    launch("submit", config_file, "launcher.slurm={export: NONE}")
    script = config_file.parent / "runs/tiny/jobs/77_submission.sh"
    lines = script.read_text().splitlines()
    assert FORGET
    assert set(FORGET) < set(lines)
    assert "#SBATCH --export=NONE" in lines
    slurm("srun", "env > environment")
    # What SLURM sets for the new job itself is kept: it is how srun knows of its tasks.
    own = {"SLURM_JOB_ID": "77", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NUM_NODES": "1"}
    subprocess.run(["bash", script], env={"PATH": os.environ["PATH"], **OUTER, **own}, check=True)
    names = {line.partition("=")[0] for line in Path("environment").read_text().splitlines()}
    assert set(own) < names
    for name in ("MEM_PER_CPU", "MEM_PER_NODE", "GPUS_PER_NODE", "TRES_PER_TASK", "EXPORT_ENV"):
        assert f"SLURM_{name}" not in names


@pytest.mark.parametrize(("time", "delay"), [("2", 120), ("0:01:00", 60), ("60", 3600), ("1", 61)])
@pytest.mark.parametrize("command", [["submit"], ["submit", "--dry-run"], ["script"]])
def test_a_limit_that_is_no_longer_than_its_warning_is_one_line(
    config_file, slurm, launch, command, time, delay
):
    slurm("sbatch", "touch queued")
    limits = (f"launcher.time={time}", f"launcher.signal_delay={delay}")
    code, out, err = launch(*command, config_file, *limits)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "launcher.time" in err
    assert f"launcher.signal_delay {delay} s" in err
    assert not (config_file.parent / "queued").exists()
    assert not list(config_file.parent.glob("runs/*"))


def test_a_limit_with_a_second_to_spare_is_queued(config_file, slurm, launch):
    limits = ("launcher.time=2", "launcher.signal_delay=119")
    assert launch("submit", config_file, *limits)[0] == 0


@pytest.mark.parametrize("name", ["a%j", "50%t/run", "%4A", "back\\slash", "%x"])
@pytest.mark.parametrize("cluster", ["slurm", "local"])
def test_a_path_that_slurm_would_fill_in_is_refused(config_file, slurm, launch, name, cluster):
    slurm("sbatch", "touch queued")
    settings = f"run.output_dir=runs/{name}"
    code, _, err = launch("submit", config_file, settings, "--cluster", cluster)
    assert (code, err.count("\n")) == (2, 1)
    assert f"runs/{name}" in err
    assert not (config_file.parent / "queued").exists()
    assert not (config_file.parent / "runs" / name).exists()


@pytest.mark.parametrize("name", ["50%", "100% sure", "a%_b"])
def test_other_percent_signs_stand_for_themselves(config_file, slurm, launch, name):
    assert launch("submit", config_file, f"run.output_dir=runs/{name}")[0] == 0
    (config_file.parent / f"runs/{name}/jobs/77_0_log.out").write_text("a line\n")
    assert launch("logs", f"runs/{name}")[1] == "a line\n"


@pytest.fixture
def moves(config_file, slurm, launch, tmp_path_factory, monkeypatch):
    """A submitted run and a sweep, each with a line of its log, seen from another folder."""
    launch("submit", config_file, "run.output_dir=runs/one")
    slurm("sbatch", "echo Submitted batch job 80")
    launch("submit", config_file, "run.output_dir=runs/many", "--sweep", "run.seed=1,2")
    runs = config_file.parent / "runs"
    for name in ("one/jobs/77_0", "many/jobs/80_0_0", "many/jobs/80_1_0"):
        (runs / f"{name}_log.out").write_text(f"{name}\n")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    return runs


def test_logs_are_found_from_another_working_folder(moves, launch):
    assert launch("logs", moves / "one")[1] == "one/jobs/77_0\n"
    assert launch("logs", moves / "many/seed=2")[1] == "many/jobs/80_1_0\n"
    assert launch("logs", moves / "many")[1].count("jobs/80_") == 4
    assert launch("status", moves / "many")[1].count("\n") == 3


@pytest.mark.parametrize("how", [shutil.copytree, shutil.move])
def test_logs_are_found_beside_a_run_that_was_copied_or_moved(moves, launch, how):
    how(moves / "one", "taken")
    how(moves / "many", "taken too")
    assert launch("logs", "taken")[1] == "one/jobs/77_0\n"
    assert launch("logs", "taken too/seed=1")[1] == "many/jobs/80_0_0\n"
    assert launch("status", "taken")[0] == 0


def test_a_job_that_has_not_begun_is_looked_for_where_its_log_will_be(moves, launch):
    (moves / "one/jobs/77_0_log.out").unlink()
    (moves / "many/jobs/80_1_0_log.out").unlink()
    assert f"{moves}/one/jobs/77_0_log.out does not exist" in launch("logs", moves / "one")[2]
    err = launch("logs", moves / "many/seed=2")[2]
    assert f"{moves}/many/jobs/80_1_0_log.out does not exist" in err


def test_the_log_of_plain_sbatch_is_found_above_the_run(config_file, slurm, launch, monkeypatch):
    run = config_file.parent / "runs/tiny"
    run.mkdir(parents=True)
    attempt = '{"attempt": 1, "job": "90", "step": 0, "time": "2026-01-01T12:00:00+00:00"}'
    (run / "attempts.jsonl").write_text(attempt + "\n")
    (config_file.parent / "slurm-90.out").write_text("step 1\n")
    monkeypatch.chdir("/")
    assert launch("logs", run)[1] == "step 1\n"
