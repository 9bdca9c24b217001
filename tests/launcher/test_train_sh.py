import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "train.sh"
ALLOCATION = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_JOB_CPUS_PER_NODE": "4(x2)",
}


@pytest.fixture
def run(stand_in, tmp_path):
    """Run the script as a job would: its exit code, the arguments srun got, and its environment."""
    stand_in("srun", 'printf "%s\\n" "$@" > arguments; env > environment; exit ${SRUN_CODE:-3}')
    stand_in("scontrol", "echo $@ > requeued")
    activate = tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("export ACTIVATED=default\n")

    def start(*arguments, **environment):
        path = os.environ["PATH"]
        result = subprocess.run(
            ["bash", SCRIPT, *arguments],
            cwd=tmp_path,
            env={"PATH": path, **environment},
            capture_output=True,
            text=True,
        )
        if result.returncode not in (3, 75):
            return result.returncode, result.stderr, {}
        srun = (tmp_path / "arguments").read_text().splitlines()
        lines = (tmp_path / "environment").read_text().splitlines()
        return result.returncode, srun, dict(line.partition("=")[::2] for line in lines)

    return start


def test_the_script_parses():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_one_task_a_node_without_gpus_and_arguments_kept_whole(run):
    code, srun, env = run("my config.yaml", "run.name=two words", **ALLOCATION)
    assert code == 3  # srun's own
    assert srun == [
        "--nodes=2",
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
        "--cpus-per-task=4",
        *("python", "-u", "-P", "-m", "t5vae", "train"),
        "my config.yaml",
        "run.name=two words",
    ]
    assert env["ACTIVATED"] == "default"
    assert env["OMP_NUM_THREADS"] == "4"


def test_one_task_a_gpu_shares_the_smallest_nodes_cpus(run):
    allocation = {**ALLOCATION, "SLURM_JOB_CPUS_PER_NODE": "72,16(x3)", "SLURM_GPUS_ON_NODE": "8"}
    _, srun, env = run(**allocation | {"SLURM_JOB_NUM_NODES": "4"})
    assert srun[1:3] == ["--ntasks=32", "--ntasks-per-node=8"]
    assert srun[4] == "--cpus-per-task=2"
    assert env["OMP_NUM_THREADS"] == "2"


def test_more_gpus_than_cpus_still_start(run):
    _, srun, env = run(**ALLOCATION, SLURM_GPUS_ON_NODE="8")
    assert srun[1:3] == ["--ntasks=16", "--ntasks-per-node=8"]
    assert srun[4] == "--overcommit"
    assert env["OMP_NUM_THREADS"] == "1"


def test_what_an_outer_job_left_is_forgotten_and_the_users_threads_are_not(run):
    _, _, env = run(**ALLOCATION, SLURM_CPU_BIND="mask", RANK="3", OMP_NUM_THREADS="5")
    assert not {"SLURM_CPU_BIND", "RANK"} & set(env)
    assert env["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize("name", ["other", "other/bin/activate"])
def test_the_environment_may_be_named_by_folder_or_script(run, tmp_path, name):
    activate = tmp_path / "other" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("export ACTIVATED=other\n")
    assert run(**ALLOCATION, T5VAE_ENV=name)[2]["ACTIVATED"] == "other"


def test_an_environment_without_anything_to_source_comes_first_on_the_path(run, tmp_path):
    python = tmp_path / "conda" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch(0o755)
    env = run(**ALLOCATION, T5VAE_ENV="conda")[2]
    assert env["PATH"].startswith("conda/bin:")
    assert "ACTIVATED" not in env


def test_a_missing_environment_or_job_is_one_line(run):
    code, err, _ = run(**ALLOCATION, T5VAE_ENV="nowhere")
    assert code == 2
    assert "no environment at nowhere" in err
    code, err, _ = run()
    assert code == 2
    assert f"sbatch {SCRIPT} [CONFIG]" in err


def test_only_a_task_that_asks_for_it_is_queued_again(run, tmp_path):
    assert run(**ALLOCATION)[0] == 3
    assert not (tmp_path / "requeued").exists()
    assert run(**ALLOCATION, SRUN_CODE="75")[0] == 75
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
