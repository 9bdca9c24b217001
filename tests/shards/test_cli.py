import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from shards import UserError
from shards.cli import app

run = CliRunner().invoke


def test_build_inspect_and_verify(corpus, tmp_path):
    out = str(tmp_path / "d")
    options = ["--tokenizer", "byte", "--max-length", "40"]
    built = run(app, ["build", str(corpus), "--out", out, *options])
    assert built.exit_code == 0, built.output
    assert "kept" in built.stdout
    assert run(app, ["verify", out]).exit_code == 0
    shown = run(app, ["inspect", out])
    assert "Share of texts" in shown.stdout
    document = json.loads(run(app, ["inspect", out, "--json", "--examples", "3"]).stdout)
    assert document["max_length"] == 40
    assert len(document["examples"]["train"]) == 3
    assert set(document["examples"]["train"]) <= set(corpus.read_text().splitlines())


@pytest.mark.parametrize(
    ("overflow", "fate"), [("drop", "dropped"), ("truncate", "truncated"), ("split", "pieces")]
)
def test_build_says_what_became_of_long_texts(corpus, tmp_path, overflow, fate):
    options = ["--tokenizer", "byte", "--max-length", "30", "--workers", "1"]
    out = str(tmp_path / "d")
    built = run(app, ["build", str(corpus), "--out", out, *options, "--overflow", overflow])
    assert built.exit_code == 0, built.output
    overlong = sum(len(line) > 29 for line in corpus.read_text().splitlines())
    [row] = [line for line in built.stdout.splitlines() if "over 30 tokens" in line]
    assert f"{overlong} texts ({overlong / 1000:.1%})" in row
    assert fate in row


def test_verify_exits_1_on_damage(dataset, tmp_path):
    (tmp_path / "index.json").write_text((dataset / "index.json").read_text())
    result = run(app, ["verify", str(tmp_path)])
    assert result.exit_code == 1
    assert "blocks.npy" in result.stdout


def test_user_errors_reach_the_caller(tmp_path):
    result = run(app, ["inspect", str(tmp_path)])
    assert isinstance(result.exception, UserError)


@pytest.mark.parametrize("command", ["build", "verify", "inspect"])
def test_help_has_an_example(command):
    result = run(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.stdout


def test_help_and_errors_load_nothing_heavy():
    code = "import shards.cli, sys; from shards import UserError; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "numpy", "pyarrow"} & set(loaded.stdout.split())
