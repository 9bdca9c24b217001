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
    stand_in("scontrol", "if [[ $1 = requeue ]]; then echo $@ > requeued; else cat record; fi")
    activate = tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("export ACTIVATED=default\n")

    def start(*arguments, record="", **environment):
        path = os.environ["PATH"]
        (tmp_path / "record").write_text(record)
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


# As `scontrol -d show job` writes it, shortened.
RECORD = """JobId=7 {array}JobName=t5vae
   UserId=me(1000) GroupId=me(1000) MCS_label=N/A
   RunTime=00:00:00 TimeLimit={limit} TimeMin=N/A
   NumNodes=2 NumCPUs=8 NumTasks=2 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   JOB_GRES=gpu:24
{nodes}
   MinCPUsNode=1 MinMemoryNode=0 MinTmpDiskNode=0
   TresPerNode=gres:gpu:2
   

"""


def record(*gpus, array="", limit="01:00:00"):
    """Of a job with these generic resources on its nodes."""
    nodes = [f"     Nodes=node{i} CPU_IDs=0 Mem=0 GRES={own}" for i, own in enumerate(gpus)]
    return RECORD.format(array=array, limit=limit, nodes="\n".join(nodes))


@pytest.mark.parametrize(
    ("gpus", "ranks"),
    [
        ([""], 1),
        (["gpu:2(IDX:0-1)"], 2),
        (["gpu:a100:3(IDX:0,2-3),gpu:v100:1(IDX:1)"], 4),
        (["shard:8(0/4,4/4),gpu:3(S:0-1)", "gpu:a:12(IDX:0-11)"], 3),
        (["nic:2(IDX:0-1)"], 1),
        (["gpu:10(IDX:0-9)", "gpu:9(IDX:0-8)"], 9),
    ],
)
def test_slurms_record_of_the_job_says_how_many_gpus_there_are(run, gpus, ranks):
    code, srun, env = run(record=record(*gpus), **ALLOCATION, SLURM_GPUS_ON_NODE="4")
    assert code == 3
    assert srun[2] == f"--ntasks-per-node={ranks}"
    assert "SLURM_GPUS_ON_NODE" not in env


@pytest.mark.parametrize("silent", ["", "JobId=8 JobName=other\n", "JobId=7 JobName=t5vae\n"])
def test_where_slurm_says_nothing_of_the_gpus_its_variable_does(run, silent):
    assert run(record=silent, **ALLOCATION, SLURM_GPUS_ON_NODE="4")[1][2] == "--ntasks-per-node=4"


def test_of_an_arrays_record_a_task_takes_its_own(run):
    ids = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    own = record("gpu:2(IDX:0-1)", array="ArrayJobId=7 ArrayTaskId=2 ")
    other = record("gpu:1(IDX:0)", limit="00:01:00").replace("JobId=7", "JobId=8 ArrayJobId=7")
    _, srun, env = run(record=other + own + other, **ALLOCATION, **ids)
    assert srun[2] == "--ntasks-per-node=2"
    assert ids.items() <= env.items()


LEFT = {
    "SLURM_CPU_BIND": "mask",
    "SLURM_MEM_PER_CPU": "100",
    "SLURM_MEM_PER_NODE": "200",
    "SLURM_MEM_BIND_TYPE": "none",
    "SLURM_CPUS_PER_TASK": "8",
    "SLURM_CPUS_PER_GPU": "2",
    "SLURM_GPUS": "4",
    "SLURM_GPUS_PER_NODE": "4",
    "SLURM_TRES_PER_TASK": "cpu:8",
    "SLURM_NTASKS_PER_GPU": "1",
    "SLURM_DISTRIBUTION": "cyclic",
    "SLURM_EXPORT_ENV": "NONE",
    "SLURM_ARRAY_JOB_ID": "5",
    "SLURM_ARRAY_TASK_ID": "1",
    "RANK": "3",
}


def test_what_an_outer_job_left_is_forgotten_and_what_the_user_set_is_not(run):
    own = {"OMP_NUM_THREADS": "5", "SLURM_MPI_TYPE": "none", "SLURM_HINT": "nomultithread"}
    _, _, env = run(record=record(""), **ALLOCATION, **LEFT, **own)
    assert not set(LEFT) & set(env)
    assert own.items() <= env.items()


@pytest.mark.parametrize(
    ("limit", "seconds"), [("00:02:00", 120), ("00:01:00", 60), ("0-00:01:40", 100)]
)
def test_a_limit_that_is_no_longer_than_its_warning_is_refused(run, limit, seconds):
    code, err, _ = run(record=record("", limit=limit), **ALLOCATION)
    assert code == 2
    assert err.count("\n") == 1
    assert f"limit of {seconds} s is no longer than its warning, which comes 120 s" in err


@pytest.mark.parametrize("limit", ["00:02:01", "01:00:00", "1-00:00:00", "UNLIMITED", "08:09:00"])
def test_a_longer_limit_or_none_is_not(run, limit):
    assert run(record=record("", limit=limit), **ALLOCATION)[0] == 3


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
