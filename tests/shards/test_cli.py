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
