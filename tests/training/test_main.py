import errno
import os
import signal
import subprocess
import sys

import pytest

from t5vae.cluster.ranks import Ranks
from t5vae.cluster.run_folder import lock_run
from t5vae.common.errors import StorageError
from t5vae.training import main as program
from t5vae.training.job import resolve
from tests.launching import TRAIN, deepspeed, environment, launcher, torchrun
from tests.refused import refusal

VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "CROSS_RANK", "TORCHELASTIC_RUN_ID"),
    *("SLURM_PROCID", "SLURM_STEP_ID", "SLURM_LOCALID"),
)

RANKS = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_NODELIST": "gpu[3-4]",
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config_file(make_config, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(make_config().dump())
    return str(path)


@pytest.fixture
def trained(monkeypatch):
    """The configurations that would have been trained."""
    configs = []
    monkeypatch.setattr(program, "train", configs.append)
    return configs


def error_line(capsys, *arguments: str) -> str:
    assert program.main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    return err


def test_a_configuration_and_overrides_are_trained(config_file, trained):
    assert program.main([config_file, "train.steps=7", "optim.lr=0.5"]) == 0
    (config,) = trained
    assert config.train.steps == 7
    assert config.optim.lr == 0.5


@pytest.mark.parametrize("arguments", [[], ["train.steps=7"]])
def test_without_a_file_the_quickstart_is_trained(config_file, trained, monkeypatch, arguments):
    monkeypatch.setattr(program, "DEFAULT_CONFIG", config_file)
    assert program.main(arguments) == 0
    assert trained[0].train.steps == (7 if arguments else 10)


@pytest.mark.parametrize(
    "added", ["--local_rank=1", "--local_rank 0", "--local-rank=0", "--local-rank 3"]
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_launchers_add_is_no_setting(config_file, trained, added, place):
    arguments = [config_file, "train.steps=7"]
    arguments[place:place] = added.split()
    assert program.main(arguments) == 0
    assert trained[0].train.steps == 7


@pytest.mark.parametrize("other", ["--local_ranks=1", "--local=1", "--locals-rank"])
def test_what_no_launcher_adds_is_refused(capsys, config_file, trained, other):
    assert other.partition("=")[0] in error_line(capsys, config_file, other)


def test_a_missing_configuration_is_one_line(capsys):
    assert "none.yaml" in error_line(capsys, "none.yaml")


def test_an_unknown_key_is_one_line_with_a_suggestion(capsys, config_file):
    assert "did you mean train.steps" in error_line(capsys, config_file, "train.step=3")


def test_missing_shards_are_one_line_with_the_command_that_builds_them(
    capsys, config_file, tmp_path
):
    line = error_line(capsys, config_file, f"data.shards={tmp_path / 'none'}")
    assert "t5vae shards build" in line
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_is_one_line(make_config):
    line = refusal(resolve, make_config(), Ranks(0, 3, 0, 3, "localhost", 1))
    assert "16" in line
    assert "3 ranks" in line


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_only_the_first_rank_of_a_host_says_what_is_wrong(capsys, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    assert program.main(["none.yaml"]) == 2
    assert capsys.readouterr() == ("", "")


LAUNCHERS = [
    {"LOCAL_RANK": "1", "CROSS_RANK": "0"},
    {"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"},
    {"SLURM_LOCALID": "1", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0"},
]


@pytest.mark.parametrize("launched", LAUNCHERS, ids=["deepspeed", "torchrun", "srun"])
def test_another_rank_that_nobody_ends_says_it_too(capsys, monkeypatch, launched):
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(program, "PATIENCE", 0.1)
    assert "none.yaml" in error_line(capsys, "none.yaml")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_another_rank_that_is_ended_is_silent(capsys, monkeypatch, number):
    for name, value in LAUNCHERS[0].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(program.time, "sleep", lambda seconds: os.kill(os.getpid(), number))
    assert program.main(["none.yaml"]) == 2
    assert capsys.readouterr() == ("", "")


# Ranks of one host under what ends all of them once one has ended, as launchers do. The first is
# the slowest.
HOST = """
import os, subprocess, sys, time
if len(sys.argv) > 1:
    from t5vae.common.errors import UserError
    from t5vae.training.main import exit_code_of

    def fail():
        time.sleep(0 if os.environ["LOCAL_RANK"] != "0" else 1)
        raise UserError("a mistake")

    sys.exit(exit_code_of(fail))
ranks = [
    subprocess.Popen([sys.executable, __file__, "rank"], env=os.environ | {"LOCAL_RANK": str(rank)})
    for rank in range(3)
]
while all(rank.poll() is None for rank in ranks):
    time.sleep(0.01)
for rank in ranks:
    if rank.poll() is None:
        rank.terminate()
sys.exit(max(rank.wait() for rank in ranks))
"""


def test_a_first_rank_that_is_slow_is_left_to_speak(tmp_path):
    (tmp_path / "host.py").write_text(HOST)
    done = subprocess.run(
        [sys.executable, tmp_path / "host.py"],
        env=environment() | {"CROSS_RANK": "0"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, "error: a mistake\n")


@pytest.mark.distributed
def test_a_mistake_is_told_once_by_real_launchers(tmp_path):
    (tmp_path / "wrong.yaml").write_text("train: {step: 3}\n")
    with launcher(tmp_path) as launch:
        commands = [deepspeed, deepspeed, lambda *given: torchrun(TRAIN, *given)]
        for launched in [launch(*command(tmp_path / "wrong.yaml")) for command in commands]:
            assert launched.end() != 0
            lines = [line for line in launched.output().splitlines() if line.startswith("error: ")]
            assert len(lines) == 1, launched.output()
            assert "did you mean train.steps" in lines[0]


def test_debug_shows_where_it_went_wrong(capsys, config_file):
    assert program.main([config_file, "train.step=3", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "did you mean train.steps" in err


def test_a_disk_that_fills_up_is_one_line(capsys, config_file, monkeypatch):
    def fill_up(config):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/metrics.jsonl")

    monkeypatch.setattr(program, "train", fill_up)
    line = error_line(capsys, config_file)
    assert "No space left" in line
    assert "runs/a/metrics.jsonl" in line


def test_an_error_that_no_user_can_mend_keeps_its_traceback(config_file, monkeypatch):
    def fail(config):
        raise RuntimeError("a bug")

    monkeypatch.setattr(program, "train", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        program.main([config_file])


def test_a_run_folder_of_another_run_is_one_line_with_both_values(
    capsys, config_file, make_config, save
):
    config = make_config()
    lock_run(config.run_dir).close()
    job = resolve(config, Ranks(0, 1, 0, 1, "127.0.0.1", 0))
    save(config.run_dir / "checkpoints", 10, job.identity)
    before = {path: path.stat().st_mtime_ns for path in config.run_dir.rglob("*")}
    line = error_line(capsys, config_file, "data.global_batch_size=32")
    assert "16" in line
    assert "32" in line
    assert program.main([config_file]) == 0
    assert "already trained" in capsys.readouterr().out
    now = {path: path.stat().st_mtime_ns for path in config.run_dir.rglob("*")}
    assert now == before


def test_a_first_host_that_is_not_found_is_one_line_with_its_name(capsys, config_file, monkeypatch):
    for name, value in {**RANKS, "SLURM_STEP_NODELIST": "gpu[3-4].invalid"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("t5vae.cluster.process_group.RESOLVING", 0.1)
    line = error_line(capsys, config_file)
    assert "gpu3.invalid" in line
    assert "/etc/hosts" in line


def test_training_takes_the_signals_over_before_it_loads_anything_heavy(monkeypatch, make_config):
    order = []
    monkeypatch.setattr(program.StopRequest, "install", lambda self: order.append("signals"))
    monkeypatch.setattr("t5vae.training.loop.run", lambda *args: order.append("run"))
    program.train(make_config())
    assert order == ["signals", "run"]


@pytest.mark.parametrize(
    ("told", "requeue"), [(None, True), (signal.SIGUSR2, True), (signal.SIGTERM, False)]
)
def test_storage_that_fails_has_the_job_queued_again_unless_it_was_ended(
    monkeypatch, capsys, make_config, told, requeue
):
    asked = []
    monkeypatch.setattr(program, "queue_again", lambda: asked.append(1))

    def run(config, together, stop):
        if told:
            os.kill(os.getpid(), told)
        raise StorageError("train-0.tar: the storage fails")

    monkeypatch.setattr("t5vae.training.loop.run", run)
    assert program.exit_code_of(lambda: program.train(make_config())) == 1
    assert capsys.readouterr().err == "error: train-0.tar: the storage fails\n"
    assert asked == [1] * requeue


# A signal that is sent when Python has put the system's handlers back.
ENDS = """
import os, signal, sys
from t5vae.training.main import exit_code_of
from t5vae.cluster.stopping import StopRequest

class Last:
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, {number})

sys.last = Last()
StopRequest().install()
sys.exit(exit_code_of(lambda: {work}))
"""


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
@pytest.mark.parametrize(("work", "code"), [("None", 0), ("sys.exit(75)", 75)])
def test_a_signal_that_comes_while_python_ends_changes_no_exit_code(number, work, code):
    program = ENDS.format(number=int(number), work=work)
    assert subprocess.run([sys.executable, "-c", program]).returncode == code
