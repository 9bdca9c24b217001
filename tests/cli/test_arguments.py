"""What is typed: paths with variables and the home in them, and what is no text."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PATHS = {
    "checkpoints": ["PATH"],
    "export": ["PATH"],
    "eval": ["PATH", "--shards", "PATH"],
    "compare": ["PATH", "run"],
    "runs": ["PATH"],
    "plot": ["PATH", "--out", "PATH"],
    "track": ["PATH"],
    "encode": ["PATH", "--file", "PATH", "--out", "PATH"],
    "decode": ["PATH", "PATH"],
    "reconstruct": ["PATH", "--file", "PATH"],
    "interpolate": ["PATH", "--file", "PATH"],
    "grid": ["PATH", "--file", "PATH"],
    "sample": ["PATH"],
    "neighbors": ["PATH", "--file", "PATH"],
    "nearest": ["PATH", "--file", "PATH", "--corpus", "PATH"],
    "direction": ["PATH", "--pairs", "PATH", "--file", "PATH"],
    "fit-property": ["PATH", "name", "--file", "PATH"],
    "optimize": ["PATH", "--property", "length", "--file", "PATH"],
    "outliers": ["PATH", "--file", "PATH"],
    "dedupe": ["PATH", "--file", "PATH", "--corpus", "PATH"],
    "config copy": ["vae", "PATH"],
    "shards build": ["PATH", "--out", "PATH", "--tokenizer", "PATH", "--max-length", "9"],
    "shards join": ["PATH"],
    "shards verify": ["PATH"],
    "shards inspect": ["PATH", "PATH", "--position", "0"],
}


@pytest.mark.parametrize("command", PATHS)
def test_variables_and_the_home_are_put_into_every_path(error_line, tmp_path, command, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    arguments = PATHS[command]
    for place, word in enumerate(arguments):
        if word == "PATH":
            typed = [*arguments[:place], "$UNSET/x", *arguments[place + 1 :]]
            typed = ["~/x" if word == "PATH" else word for word in typed]
            line = error_line(*command.split(), *typed, stdin=b"x")
            assert "'$UNSET/x' needs the variable 'UNSET', which is not set" in line
    assert not any(tmp_path.iterdir())


def test_a_path_with_a_variable_or_the_home_is_found(t5vae, error_line, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    for place in ("home", "scratch"):
        (tmp_path / place).mkdir()
    assert t5vae("config", "copy", "vae", "~/a.yaml")[1] == f"copied: {tmp_path}/home/a.yaml\n"
    assert (tmp_path / "home" / "a.yaml").is_file()
    assert t5vae("config", "copy", "vae", "${SCRATCH}")[0] == 0
    assert (tmp_path / "scratch" / "vae.yaml").is_file()
    assert f"{tmp_path}/home/none" in error_line("export", "~/none")
    assert f"{tmp_path}/scratch/none" in error_line("plot", "$SCRATCH/none")
    assert f"{tmp_path}/scratch/none" in error_line("compare", "$SCRATCH/none", "~/none")


@pytest.mark.parametrize(
    "arguments",
    [
        ["encode", "run", b"caf\xe9"],
        ["config", "show", b"\xff.yaml"],
        ["runs", b"runs/\xc3"],
        ["plot", "runs", b"--out=\xf0\x9f.png"],
    ],
)
def test_an_argument_that_is_not_utf8_is_one_line(error_line, arguments):
    shown = arguments[-1].decode(errors="backslashreplace")
    line = error_line(*map(os.fsdecode, arguments))
    assert f"the argument '{shown}' is not UTF-8" in line


def test_an_argument_that_is_not_utf8_is_one_line_of_the_installed_command():
    command = [Path(sys.executable).parent / "t5vae", "encode", "run", b"caf\xe9"]
    for locale in ("C", "C.UTF-8"):
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "LC_ALL": locale}
        )
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: the argument 'caf\\xe9' is not UTF-8")
