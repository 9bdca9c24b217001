"""A training run on two hosts: started, warned, preempted, cancelled, broken, and going on."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import TRAIN, read

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
LOSSES = ("loss", "reconstruction", "mmd")
LONG = 1_000_000  # steps: nobody waits for their end


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [[line["step"], *(line[key] for key in LOSSES)] for line in lines]


def steps_printed(text):
    """Every step that a log tells of, over all restarts."""
    return [int(step.replace(",", "")) for step in re.findall(r"^step +([\d,]+)/", text, re.M)]


def test_both_launchers_on_two_hosts_give_the_losses_of_deepspeed_on_one(slurm):
    job = slurm.sbatch()
    assert slurm.end(job) == "COMPLETED", slurm.log(job)
    by_sbatch = losses(slurm.run)
    assert len(by_sbatch) == 40
    assert "2 ranks on 2 hosts (node1, node2); an all-reduce of 16 MiB takes" in slurm.log(job)
    health = json.loads((slurm.run / "health.json").read_text())
    assert [row["host"] for row in health["ranks"]] == ["node1", "node2"]
    assert health["all_reduce"] > 0

    told = slurm.launch("submit", slurm.config, "run.output_dir=runs/submitted", "--nodes", 2)
    job = told.split()[1]
    assert slurm.end(job) == "COMPLETED", slurm.launch("logs", job)
    assert losses(slurm.folder / "runs/submitted") == by_sbatch
    assert re.search(rf"{job} +COMPLETED +node\[1-2\] +40/40 ", slurm.launch("status", job))
    for rank in (0, 1):
        assert (slurm.folder / f"runs/submitted/jobs/{job}_{rank}_log.out").exists()

    command = [BIN / "deepspeed", "--num_accelerators", 2, ROOT / "train.py", slurm.config]
    environment = ("env", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1", f"PATH={BIN}:/usr/bin:/bin")
    slurm(*environment, *command, "run.output_dir=runs/alone")
    assert losses(slurm.folder / "runs/alone") == by_sbatch


def test_a_printed_job_that_meets_its_time_limit_goes_on_until_it_is_done(slurm, pace):
    """`t5vae-launch script`, in a folder that is no checkout."""
    steps = round(90 * pace)  # SLURM warns it between 30 and 60 seconds after its start
    limit = ("launcher.time=2", "launcher.signal_delay=60")
    script = slurm.launch("script", slurm.config, f"run.output_dir={slurm.run}", *limit)
    (slurm.folder / "job.sh").write_text(script)
    job = slurm("sbatch", "--parsable", "job.sh", f"train.steps={steps}").strip()
    assert slurm.end(job) == "COMPLETED", slurm.log(job)
    assert [attempt["job"] for attempt in slurm.attempts()] == [job] * len(slurm.attempts())
    assert len(slurm.attempts()) >= 2
    assert "told to stop: saved at step" in slurm.log(job)
    assert steps_printed(slurm.log(job)) == list(range(1, steps + 1))


def test_a_job_takes_nothing_over_from_the_job_that_it_is_submitted_in(slurm):
    """Of an allocation with two GPUs and memory a CPU, and of a step that left its own behind."""
    left = "SLURM_GPUS_ON_NODE=2 SLURM_NTASKS_PER_GPU=2 SLURM_ARRAY_JOB_ID=1 SLURM_ARRAY_TASK_ID=3"
    place = f"sbatch --parsable --chdir={ROOT} --output={slurm.folder}/slurm-%j.out"
    train = f"{TRAIN} {slurm.config} train.steps=3 run.output_dir={slurm.folder}/runs"
    submit = f"{BIN}/t5vae-launch submit {slurm.config} train.steps=3 launcher.nodes=1 --mem 200"
    shell = f"""
        export {left}
        {place} --mem=200 --export=NONE {train}/plain
        {place} --gpus-per-node=2 {train}/gpus
        {place} --time=2 {train}/short
        export SBATCH_EXPORT=NONE
        {submit} run.output_dir=runs/submitted | awk '$1 == "job" {{ print $2 }}'
    """
    outer = ("salloc", "--nodes=1", "--mem-per-cpu=100", "--gpus-per-node=2", "--time=5")
    plain, gpus, short, submitted = slurm(*outer, "bash", "-ec", shell).split()
    for job, ranks, run in ((plain, 1, "plain"), (gpus, 2, "gpus"), (submitted, 1, "submitted")):
        assert slurm.end(job) == "COMPLETED", slurm.log(job)
        log = slurm.launch("logs", job) if run == "submitted" else slurm.log(job)
        assert f" parameters, {ranks} ranks, " in log
        (attempt,) = read(slurm.folder / "runs" / run / "attempts.jsonl")
        assert attempt["job"] == job
    assert slurm.end(short) == "FAILED"
    (line,) = slurm.log(short).splitlines()
    assert line.startswith("the time limit of 120 s is no longer than its warning")


def test_hosts_whose_names_lead_nowhere_train_alone_and_are_named_together(slurm, cluster):
    hosts = cluster.ROOT / "hosts"
    known = hosts.read_text()
    hosts.write_text("127.0.0.1 localhost\n")
    try:
        alone = slurm.sbatch("train.steps=3", options=("--nodes=1",))
        both = slurm.sbatch(f"run.output_dir={slurm.folder}/runs/both")
        assert slurm.end(alone) == "COMPLETED", slurm.log(alone)
        assert slurm.end(both) == "FAILED"
    finally:
        hosts.write_text(known)
    errors = re.findall(r"^error: .*", slurm.log(both), re.M)
    assert 1 <= len(errors) == len(set(errors)) <= 2  # a host's, and the other's if in time
    assert all(" finds no address for node" in line for line in errors)
    assert "Traceback" not in slurm.log(both)


@pytest.mark.parametrize(
    "lost",
    [
        "node2",
        pytest.param("node1", marks=pytest.mark.soak),
    ],
)
@pytest.mark.parametrize(
    "harm",
    ["kill_node", pytest.param("cut", marks=pytest.mark.soak)],
)
def test_a_job_that_loses_a_host_goes_on_from_its_checkpoint_on_others(
    slurm, cluster, pace, harm, lost
):
    steps = round(30 * pace)
    every = max(1, steps // 20)
    job = slurm.sbatch(f"train.steps={steps}", f"checkpoint.every={every}")
    slurm.wait(lambda: slurm.steps() > 2 * every, lambda: slurm.log(job))
    getattr(cluster, harm)(lost)
    try:
        slurm.wait(lambda: len(slurm.attempts()) == 2, lambda: slurm.log(job))
        first, second = slurm.attempts()
        assert lost in first["hosts"]
        assert lost not in second["hosts"]
        assert second["step"] >= 2 * every
        assert second["step"] % every == 0
        assert slurm.end(job) == "COMPLETED", slurm.log(job)
    finally:
        cluster.start_node(lost) if harm == "kill_node" else cluster.mend(lost)
    lines = (slurm.run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))


@pytest.mark.soak
def test_one_job_is_warned_requeued_and_preempted_and_does_no_step_twice(slurm, pace):
    steps = round(45 * pace)
    job = slurm.sbatch(f"train.steps={steps}", "log.wandb=true")

    def interrupted_after(attempt, interrupt):
        slurm.wait(
            lambda: (
                len(slurm.attempts()) == attempt and slurm.steps() > slurm.attempts()[-1]["step"]
            ),
            lambda: slurm.log(job),
        )
        interrupt()

    interrupted_after(1, lambda: slurm("scancel", "--signal=USR2", job))
    interrupted_after(2, lambda: slurm("scontrol", "requeue", job))
    urgent = ("--partition=urgent", "--nodes=3", "--parsable", "--output=/dev/null")
    interrupted_after(3, lambda: slurm("sbatch", *urgent, "--wrap=srun sleep 2"))
    assert slurm.end(job) == "COMPLETED", slurm.log(job)
    assert [attempt["job"] for attempt in slurm.attempts()] == [job] * 4
    assert slurm.log(job).count("told to stop: saved at step") == 3
    assert steps_printed(slurm.log(job)) == list(range(1, steps + 1))
    name = (slurm.run / "wandb/run-id").read_text()
    runs = [path.name for path in slurm.run.glob("wandb/offline-run-*")]
    assert len(runs) == 4
    assert all(run.endswith(name) for run in runs)


@pytest.mark.soak
def test_a_cancelled_job_saves_and_stays_dead_and_its_run_is_held_until_then(slurm):
    slurm.launch("submit", slurm.config, f"train.steps={LONG}")
    slurm.wait(lambda: slurm.steps() > 5)
    refused = slurm.call(BIN / "t5vae-launch", "submit", slurm.config, f"train.steps={LONG}")
    assert refused.returncode == 2
    (job,) = re.findall(r"held by job (\d+)", refused.stderr)
    second = slurm.launch("submit", slurm.config, f"train.steps={LONG}", "--force").split()[1]
    assert "Dependency" in slurm.launch("status", second)

    slurm.launch("cancel", second)
    slurm.launch("cancel", job)
    assert slurm.end(job) == "CANCELLED"
    saved = [int(path.name[5:]) for path in (slurm.run / "checkpoints").glob("step-*")]
    assert saved == [slurm.steps()]
    assert len(slurm.attempts()) == 1
    assert len(slurm("squeue", "--noheader")) == 0

    resumed = slurm.launch("resume", "runs/tiny", f"train.steps={saved[0] + 5}").split()[1]
    assert slurm.end(resumed) == "COMPLETED"
    assert slurm.steps() == saved[0] + 5


@pytest.mark.soak
def test_a_sweep_is_an_array_with_a_folder_for_each_run(slurm, cluster):
    sweep = ("--sweep", "run.seed=1,2,3", "--nodes", 1)
    told = slurm.launch("submit", slurm.config, f"train.steps={LONG}", *sweep)
    runs = [slurm.folder / "runs/tiny" / f"seed={seed}" for seed in (1, 2, 3)]
    slurm.wait(lambda: all((run / "metrics.jsonl").exists() for run in runs))
    array = re.search(r"job (\d+)_0 ", told)[1]
    table = slurm.launch("status", "runs/tiny")
    assert len(re.findall(rf"^{array}_[012] +RUNNING +node[123] ", table, re.M)) == 3
    assert slurm.launch("logs", array).count("==> ") == 3
    assert slurm.launch("logs", f"{array}_1").count("step ") > 0
    slurm.launch("cancel", "runs/tiny")
    for task in range(3):
        assert slurm.end(f"{array}_{task}") == "CANCELLED"
    assert len(list(slurm.folder.glob("runs/tiny/*/checkpoints/step-*"))) == 3


@pytest.mark.soak
def test_a_host_without_the_shards_is_named_and_can_be_left_out(slurm, cluster, corpus):
    assert cluster.in_node("node2", "mount", "-t", "tmpfs", "none", str(corpus)).returncode == 0
    try:
        job = slurm.sbatch()
        assert slurm.end(job) == "FAILED"
        (error,) = set(re.findall(r"^error: .*", slurm.log(job), re.M))
        assert error.startswith("error: node2: ")
        assert str(corpus) in error

        slurm.launch("submit", slurm.config, "--exclude-unhealthy")
        slurm.wait(lambda: slurm.steps() == 40)
        assert slurm.attempts()[-1]["hosts"] == ["node1", "node3"]
        assert "takes over, without node2" in slurm.launch("logs", str(int(job) + 1))
    finally:
        cluster.in_node("node2", "umount", str(corpus))


@pytest.mark.soak
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--partition", "nowhere"], "invalid partition"),
        (["train.step=1"], "did you mean train.steps"),
        (["data.shards=nowhere"], "t5vae shards build"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line_before_anything_is_queued(slurm, arguments, says):
    answer = slurm.call(BIN / "t5vae-launch", "submit", slurm.config, *arguments)
    assert answer.returncode == 2
    assert answer.stderr.count("\n") == 1
    assert says in answer.stderr
    assert not (slurm.folder / "runs/tiny").exists()
    assert slurm("squeue", "--noheader") == ""
