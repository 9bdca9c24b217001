import re
import subprocess
import sys

import pytest
from submitit.core.utils import DelayedSubmission

from launcher.cli import main
from shards import UserError
from t5vae.config import load_config


@pytest.fixture
def launch(monkeypatch, capsys):
    """Run the command line in this process: its exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["t5vae-launch", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def slurm(stand_in):
    """sbatch that takes every job as number 77, and a queue that does not know it."""
    stand_in("srun", "exit 1")
    stand_in("sbatch", "echo Submitted batch job 77")
    stand_in("squeue", "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")
    return stand_in


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train.step=3"], "did you mean train.steps"),
        (["data.shards=nowhere"], "t5vae shards build"),
        (["data.global_batch_size=9", "--nodes", 2], "cannot be dealt to 2 ranks"),
        (["--nodes", 3, "--gpus-per-node", 2], "cannot be dealt to 6 ranks"),
        (["--nodes", 0], "launcher.nodes"),
    ],
)
def test_what_training_would_refuse_is_refused_before_queueing(
    arguments, says, config_file, slurm, launch
):
    slurm("sbatch", "touch queued")
    code, out, err = launch("submit", config_file, *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in config_file.parent.iterdir()) == ["stand-ins", "tiny.yaml"]


def test_no_sbatch_is_one_line_that_names_the_way_out(config_file, monkeypatch, launch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = launch("submit", config_file)
    assert code == 2
    assert "--cluster local" in err
    assert not (config_file.parent / "runs").exists()


def test_what_sbatch_refuses_is_one_line(config_file, slurm):
    slurm("sbatch", "printf 'sbatch: error: invalid partition\\nBatch job failed\\n' >&2; exit 1")
    command = [sys.executable, "-m", "launcher", "submit", config_file, "--partition", "nope"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    refusal = "error: SLURM refuses the job: sbatch: error: invalid partition Batch job failed\n"
    assert result.stderr == refusal


def test_submit_hands_flags_and_configuration_to_slurm(config_file, slurm, launch):
    code, out, _ = launch(
        *("submit", config_file, "train.steps=5", "launcher.cpus_per_task=4", "--nodes", 2),
        *("--gpus-per-node", 2, "--time", 90, "--partition", "my gpus", "--account", "lab"),
    )
    assert code == 0
    assert out.splitlines() == [
        "job 77 on slurm: 2 x 2 ranks",
        "log:    runs/tiny/jobs/77_0_log.out",
        "follow: t5vae-launch logs -f runs/tiny",
    ]
    script = (config_file.parent / "runs/tiny/jobs/77_submission.sh").read_text()
    lines = script.splitlines()
    for line in (
        "#SBATCH --job-name=tiny",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --time=90",
        "#SBATCH --partition='my gpus'",
        "#SBATCH --account=lab",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=USR2@120",
    ):
        assert line in lines
    assert "--kill-on-bad-exit=1 --cpus-per-task=4" in script
    sent = DelayedSubmission.load(config_file.parent / "runs/tiny/jobs/77_submitted.pkl").function
    assert sent.config.train.steps == 5
    assert sent.config.launcher.nodes == 2


def test_a_run_without_gpus_asks_for_none(config_file, slurm, launch):
    assert launch("submit", config_file)[0] == 0
    script = (config_file.parent / "runs/tiny/jobs/77_submission.sh").read_text()
    assert "#SBATCH --ntasks-per-node=1" in script
    for option in ("--gpu", "--partition", "--account"):
        assert option not in script


def test_resume_submits_the_folder_as_it_stands(config_file, slurm, launch):
    run = config_file.parent / "moved run"
    run.mkdir()
    run.joinpath("config.yaml").write_text(
        load_config(config_file, ["checkpoint.resume=never"]).dump()
    )
    assert launch("resume", run, "train.steps=9")[0] == 0
    sent = DelayedSubmission.load(run / "jobs/77_submitted.pkl").function.config
    assert sent.run_dir == run
    assert sent.train.steps == 9
    assert sent.checkpoint.resume == "auto"


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


def test_status_does_not_call_a_job_ended_when_slurm_is_silent(config_file, slurm, launch):
    launch("submit", config_file)
    slurm("squeue", "echo Unable to contact slurm controller >&2; exit 1")
    code, _, err = launch("status")
    assert code == 2
    assert "Unable to contact" in err


def test_the_launcher_loads_no_accelerator():
    code = "import launcher.cli, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "deepspeed"} & set(loaded.stdout.split())


def test_a_users_mistake_in_a_task_ends_with_code_2(config_file, monkeypatch, capsys):
    import t5vae.training
    from launcher.task import Training

    def train(config):
        raise UserError("no space")

    monkeypatch.setattr(t5vae.training, "train", train)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    with pytest.raises(SystemExit) as ended:
        Training(load_config(config_file))()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no space\n"
