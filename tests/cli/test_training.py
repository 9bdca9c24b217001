"""`t5vae train --ranks` and `t5vae quickstart`: what they start. Real ones are in tests/wheel."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import shards
from t5vae.cli import training

OVERRIDES = ["data.shards=d", "run.output_dir=r", "train.steps=3"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "lines.txt").write_text("".join(f"value_{i} = {i}\n" for i in range(60)))
    how = {"tokenizer": "byte", "max_length": 24, "valid_fraction": 0.1}
    shards.build(folder / "lines.txt", folder / "lines", **how)
    return f"data.shards={folder / 'lines'}"


@pytest.fixture
def replaced(monkeypatch):
    """The command and environment that would stand in this process's place."""
    found = []

    def become(path, command, environment):
        found[:] = command, environment
        raise SystemExit(0)

    monkeypatch.setattr(training.os, "execve", become)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return found


def test_ranks_are_started_by_deepspeed_with_all_that_was_typed(t5vae, replaced, dataset):
    typed = [dataset, "run.name=two words"]
    assert t5vae("train", "quickstart", "--ranks", 2, *typed, "--debug")[0] == 0
    command, environment = replaced
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert command[command.index("--num_accelerators") + 1] == "2"
    program = command[command.index("--no_python") + 1 :]
    assert program == [
        *(sys.executable, "-u", "-P", "-m", "t5vae", "train"),
        *("quickstart", *typed, "--debug"),
    ]
    assert (environment["PYTHONSAFEPATH"], environment["DS_ACCELERATOR"]) == ("1", "cpu")


@pytest.mark.parametrize(
    ("typed", "ranks", "says"),
    [
        (["train.step=3"], 2, "did you mean train.steps?"),
        (["data.shards=nowhere"], 2, "t5vae shards build SOURCE --out nowhere"),
        ([], 3, "128 cannot be dealt to 3 ranks"),
    ],
)
def test_a_mistake_is_told_once_before_ranks_are_started(
    error_line, replaced, dataset, typed, ranks, says
):
    assert says in error_line("train", "quickstart", dataset, *typed, "--ranks", ranks)
    assert not replaced


def test_more_ranks_than_accelerators_are_refused(error_line, replaced, dataset, monkeypatch):
    monkeypatch.setattr(training, "_accelerators", lambda: 2)
    assert "has 2 accelerators" in error_line("train", "quickstart", dataset, "--ranks", 4)
    assert not replaced


def test_the_quickstart_goes_all_the_way(t5vae, monkeypatch):
    began = []
    monkeypatch.setattr(training, "_run", lambda command: began.append(command) or 0)
    monkeypatch.setattr(training, "_accelerators", lambda: 0)
    code, out, _ = t5vae("quickstart", *OVERRIDES)
    assert code == 0
    names = [command[0] for command in began]
    assert names == ["shards", "train", "export", "eval", "interpolate", "sample"]
    assert began[0][began[0].index("--out") + 1] == "d"
    assert began[1] == ["train", "quickstart", "train.minutes=7", *OVERRIDES, "--ranks", "2"]
    assert began[2:4] == [["export", "--finished", "r"], ["eval", "r"]]
    assert "t5vae export --finished r" in out.splitlines()
    assert "r/eval.html" in out


def test_the_quickstart_ends_where_a_command_fails(t5vae, monkeypatch):
    began = []
    monkeypatch.setattr(training, "_run", lambda command: began.append(command) or 2)
    assert t5vae("quickstart", *OVERRIDES)[0] == 2
    assert len(began) == 1


def test_the_quickstart_of_a_mixture_is_refused(error_line):
    assert "one folder" in error_line("quickstart", "data.shards=[a, b]")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 7), (signal.SIGINT, 0)])
def test_a_command_of_the_quickstart_is_told_to_stop_once(number, code, tmp_path):
    """SIGTERM is passed on; Ctrl-C reaches the command by itself, and is waited for."""
    child = """if True:
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        print("ready", flush=True)
        time.sleep(1)
    """
    parent = f"""if True:
        import sys
        from t5vae.cli import training
        training.PYTHON_T5VAE = (sys.executable, "-c")
        sys.exit(training._run([{child!r}]))
    """
    started = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert started.stdout.readline() == "ready\n"
    started.send_signal(number)
    assert started.wait(60) == code


def test_the_module_is_the_command():
    command = [sys.executable, "-P", "-m", "t5vae", "config", "show", "none.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path("/"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no configuration at none.yaml")
