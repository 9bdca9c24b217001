import subprocess
import sys
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission

from t5vae.common.errors import UserError
from t5vae.config import load_config


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


def test_resume_submits_the_folder_as_it_stands(config_file, slurm, launch, monkeypatch):
    run = config_file.parent / "moved run"
    run.mkdir()
    run.joinpath("config.yaml").write_text(
        load_config(config_file, ["checkpoint.resume=never"]).dump()
    )
    monkeypatch.setenv("HERE", str(config_file.parent))
    assert launch("resume", "$HERE/moved run", "train.steps=9")[0] == 0
    sent = DelayedSubmission.load(run / "jobs/77_submitted.pkl").function.config
    assert sent.run_dir == run
    assert sent.train.steps == 9
    assert sent.checkpoint.resume == "auto"


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


def test_everything_that_slurm_takes_reaches_it(config_file, slurm, launch):
    code, script, _ = launch(
        *("submit", config_file, "--dry-run", "--time", "1-12", "--qos", "high", "--mem", "64G"),
        *("--constraint", "a100|h100", "--exclude", "node[7-9]", "--gres", "gpu:a100:8"),
        *("--gpus-per-node", 2, "--mail-user", "me@lab.org", "--mail-type", "END,FAIL"),
        *("--setup", "module load cuda", "--setup", "export X='a b'"),
        *("--srun-arg=--container-image=my image.sqsh", "launcher.signal_delay=300"),
        "launcher.slurm={reservation: friday, exclusive: true, contiguous: false}",
    )
    assert code == 0
    lines = script.splitlines()
    for line in (
        "#SBATCH --time=2160",
        "#SBATCH --qos=high",
        "#SBATCH --mem=64G",
        "#SBATCH --constraint='a100|h100'",
        "#SBATCH --exclude='node[7-9]'",
        "#SBATCH --gres=gpu:a100:8",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --mail-user=me@lab.org",
        "#SBATCH --mail-type=END,FAIL",
        "#SBATCH --reservation=friday",
        "#SBATCH --exclusive",
        "#SBATCH --signal=USR2@300",
        "export PYTHONSAFEPATH=1",
        "module load cuda",
        "export X='a b'",
    ):
        assert line in lines
    assert "'--container-image=my image.sqsh'" in script
    assert "--gpus-per-node" not in script
    assert "contiguous" not in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert not (config_file.parent / "runs").exists()


def test_a_container_stands_in_place_of_python(config_file, slurm, launch):
    python = "apptainer exec --nv t5vae.sif python"
    launch("submit", config_file, f"launcher.python={python}")
    script = (config_file.parent / "runs/tiny/jobs/77_submission.sh").read_text()
    assert f"{python} -u -m submitit.core._submit" in script


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True)])
def test_a_task_can_ask_its_script_to_be_queued_again(
    config_file, slurm, launch, code, requeued, monkeypatch
):
    launch("submit", config_file)
    slurm("srun", f"exit {code}")
    slurm("scontrol", "echo $@ > requeued")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    script = config_file.parent / "runs/tiny/jobs/77_submission.sh"
    assert subprocess.run(["bash", script]).returncode == code
    told = config_file.parent / "requeued"
    assert told.exists() is requeued
    assert not requeued or told.read_text() == "requeue 77\n"


def test_a_sweep_is_every_combination_in_folders_of_their_own(config_file, slurm, launch):
    slurm("sbatch", "cat $1 > script; echo Submitted batch job 80")
    code, out, err = launch(
        *("submit", config_file, "train.steps=9", "--array-parallelism", 2),
        *("--sweep", "optim.lr=1e-3,0.01", "--sweep", "objective.mmd.kernel=imq,rbf"),
    )
    assert code == 0, err
    sweep = config_file.parent / "runs/tiny"
    names = [f"lr={lr},kernel={kernel}" for lr in ("1e-3", "0.01") for kernel in ("imq", "rbf")]
    assert sorted(path.name for path in sweep.iterdir()) == sorted(["jobs", *names])
    for task, name in enumerate(names):
        assert f"job 80_{task} on slurm: 1 x 1 ranks\n" in out
        written = load_config(sweep / name / "config.yaml")
        assert written.run_dir == Path("runs/tiny") / name
        assert written.run.name == f"tiny-{name}"
        assert written.train.steps == 9
        assert f"{written.optim.lr:g}" in ("0.001", "0.01")
        sent = DelayedSubmission.load(sweep / f"jobs/80_{task}_submitted.pkl").function
        assert sent.config == written
    script = (config_file.parent / "script").read_text()
    assert "#SBATCH --array=0-3%2\n" in script
    assert "#SBATCH --job-name=tiny\n" in script
    assert out.endswith("follow: t5vae-launch logs -f runs/tiny\n")
    assert launch("status", "80")[1].count("\n") == 5
    assert launch("status", "80_2")[1].count("\n") == 2


@pytest.mark.parametrize(
    ("sweep", "key", "values"),
    [
        ("eval.check=regex:a b,regex:c #d", "check", ["regex:a b", "regex:c #d"]),
        ("eval.measure=on,007", "measure", ["on", "007"]),
        ("run.seed=1,02", "seed", [1, 2]),
        ("optim.lr=1e-3,2e-3", "lr", [1e-3, 2e-3]),
        ("deepspeed.config=null,$HOME/ds.json", "config", [None, "/home/ada/ds.json"]),
    ],
)
def test_values_of_a_sweep_are_what_their_key_holds(
    config_file, slurm, launch, monkeypatch, sweep, key, values
):
    monkeypatch.setenv("HOME", "/home/ada")
    code, _, err = launch("submit", config_file, "--sweep", sweep)
    assert code == 0, err
    section = sweep.partition(".")[0]
    runs = config_file.parent.glob(f"runs/tiny/{key}=*/config.yaml")
    found = [load_config(run) for run in runs]
    assert {getattr(getattr(config, section), key) for config in found} == set(values)
    assert len({config.run.name for config in found}) == 2


def test_options_are_taken_as_they_are_typed(config_file, slurm, launch):
    code, script, err = launch(
        *("submit", config_file, "--dry-run", "--partition", "on", "--account", "007"),
        *("--setup", "echo 'a' #b", "--constraint", "[a|b]", "run.name=x #1"),
    )
    assert code == 0, err
    lines = script.splitlines()
    for option in ("partition=on", "account=007", "constraint='[a|b]'", "job-name='x #1'"):
        assert f"#SBATCH --{option}" in lines
    assert "echo 'a' #b" in lines


@pytest.mark.parametrize(
    "sweep",
    [
        *("optim.lr", "optim.lr=", "optim.lr=[1", "launcher.nodes=1,2", "run.seed=1,1"),
        *("optim.lrs=1,2", "eval.check=", "eval.check=a,,b"),
    ],
)
def test_what_is_no_sweep_is_refused_in_one_line(config_file, slurm, launch, sweep):
    code, out, err = launch("submit", config_file, "--sweep", sweep)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert not (config_file.parent / "runs").exists()


def test_what_slurm_refuses_leaves_nothing_behind(config_file, slurm, launch):
    slurm("sbatch", "exit 1")
    assert launch("submit", config_file)[0] == 2
    assert not (config_file.parent / "runs/tiny").exists()


def test_the_configuration_is_put_into_a_new_runs_folder_alone(config_file, slurm, launch):
    launch("submit", config_file, "train.steps=5")
    run = config_file.parent / "runs/tiny"
    assert load_config(run / "config.yaml").train.steps == 5
    (run / "checkpoints").mkdir()
    launch("submit", config_file, "train.steps=6")
    assert load_config(run / "config.yaml").train.steps == 5


def test_a_base_from_the_hub_is_put_into_the_runs_folder(
    config_file, slurm, launch, tmp_path, monkeypatch
):
    cached = tmp_path / "cached"
    cached.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (cached / name).write_text(name)
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        return str(cached)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for _ in range(2):
        assert launch("submit", config_file, "model.base=google/t5-tiny")[0] == 0
    assert asked == ["google/t5-tiny"]
    run = config_file.parent / "runs/tiny"
    assert load_config(run / "config.yaml").model.base == "runs/tiny/base"
    assert (run / "base/model.safetensors").read_text() == "model.safetensors"


def test_a_base_that_cannot_be_had_is_refused(config_file, slurm, launch):
    slurm("sbatch", "touch queued")
    code, _, err = launch("submit", config_file, "model.base=no/such-model")
    assert code == 2
    assert err.count("\n") == 1
    assert "no/such-model" in err
    assert not (config_file.parent / "queued").exists()
    assert not (config_file.parent / "runs/tiny").exists()


@pytest.mark.parametrize("weather", [True, False])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_job_with_a_broken_node_is_queued_without_it_by_one_rank(
    config_file, slurm, monkeypatch, capsys, is_first, weather
):
    from launcher.task import Training
    from t5vae.cluster.errors import UnhealthyError

    def train(config):
        raise UnhealthyError(
            "node2: no shards", ["node2"], is_first_healthy=is_first, weather=weather
        )

    slurm("sbatch", "cat $1 >> script; echo Submitted batch job 78")
    monkeypatch.setattr("t5vae.training.train", train)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    settings = ["launcher.exclude_unhealthy=true", "launcher.exclude=node9"]
    with pytest.raises(SystemExit) as ended:
        Training(load_config(config_file, settings))()
    assert ended.value.code == (1 if weather and not is_first else 2)
    out, err = capsys.readouterr()
    assert err == "error: node2: no shards\n"
    script = config_file.parent / "script"
    assert script.exists() is is_first
    if is_first:
        assert out == "job 78 takes over, without node2\n"
        assert "#SBATCH --exclude=node9,node2\n" in script.read_text()
        assert "#SBATCH --dependency=afterany:77\n" in script.read_text()


@pytest.mark.parametrize("place", ["a file", "a file/below", "/proc/run"])
def test_a_folder_that_cannot_be_made_is_one_line(config_file, slurm, launch, place):
    (config_file.parent / "a file").write_text("mine")
    code, out, err = launch("submit", config_file, f"run.output_dir={place}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "cannot write the run's folder" in err
    assert (config_file.parent / "a file").read_text() == "mine"


def test_a_job_whose_record_cannot_be_written_is_cancelled(config_file, slurm, launch):
    slurm("sbatch", "mkdir -p runs/tiny/jobs/77.json; echo Submitted batch job 77")
    slurm("squeue", "echo '77|PENDING||1|1:00|Priority'")
    slurm("scancel", "echo $@ > cancelled")
    code, out, err = launch("submit", config_file)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert (config_file.parent / "cancelled").read_text() == "77\n"
