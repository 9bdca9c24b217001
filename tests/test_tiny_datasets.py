"""Datasets of one to three sequences: every command works, or says in a line why it cannot."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml

import shards
from t5vae.common.kinds import PRIORS
from tests.launching import PATIENCE, T5, TRAIN, environment

pytestmark = pytest.mark.distributed

LINES = ["x = 1", "y = foo(2)", "return z"]
SIZES = {"one": (1, 0.0), "two": (2, 0.0), "three": (3, 0.0), "halves": (3, 0.5)}
TEXTS, WORKS, REFUSED = ("x = 1",), {0}, {2}
PAIRS, FILE, CODES = "PAIRS", "FILE", "CODES"  # paths beside the run
COMMANDS = [
    (("encode", *TEXTS), WORKS),
    (("encode", "--file", FILE), WORKS),
    (("decode", CODES, "-n", 2), WORKS),
    (("reconstruct", *TEXTS), WORKS),
    (("interpolate", "x = 1", "y = 2", "--steps", 3), WORKS),
    (("interpolate", "x = 1", "x = 1", "--steps", 2), WORKS),
    (("grid", *"abcd", "--steps", 2), WORKS),
    (("neighbors", *TEXTS, "-n", 3), WORKS),
    (("nearest", *TEXTS, "-n", 5), WORKS),
    (("direction", "--pairs", PAIRS, *TEXTS), WORKS),
    (("fit-property", "len", "--function", "length"), REFUSED),
    (("optimize", "--property", "length", *TEXTS, "-n", 2), REFUSED),
    (("outliers", *TEXTS), WORKS),
    (("outliers", "--file", FILE, "-n", 9), WORKS),
    (("dedupe", "--file", FILE), WORKS),
    (("dedupe", "--file", FILE, "--radius", 9), WORKS),
    (("eval", "--samples", 5, "--interpolations", 2), REFUSED),
    (("export",), WORKS),
    (("checkpoints", "--verify"), WORKS),
    (("runs",), WORKS),
    (("compare",), REFUSED),
    (("plot", "--out", "plot.svg"), WORKS),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The datasets, and a run of three steps on the last, exported. Not to be changed."""
    folder = tmp_path_factory.mktemp("tiny")
    for name, (count, held_out) in SIZES.items():
        lines = folder / f"{name}.txt"
        lines.write_text("\n".join(LINES[:count]) + "\n")
        options = {"tokenizer": "byte", "max_length": 24, "workers": 1}
        shards.build(lines, folder / name, valid_fraction=held_out, **options)
    (folder / PAIRS).write_text("x = 1\ty = 1\n")
    config = {
        "run": {"output_dir": str(folder / "run")},
        "data": {"shards": str(folder / "halves"), "global_batch_size": 4},
        "model": {"t5": T5, "latent_size": 6, "memory_length": 3},
        "train": {"steps": 3, "precision": "fp32"},
        "checkpoint": {"every": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, TRAIN, folder / "config.yaml"]
    done = subprocess.run(
        command, env=environment(), timeout=PATIENCE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "3/3" in done.stderr
    from t5vae.checkpoint.export import export

    export(folder / "run")
    return folder


@pytest.fixture(params=SIZES)
def run(request, folder, tmp_path):
    """The run, as if it had been on each of the datasets."""
    run = shutil.copytree(folder / "run", tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["shards"] = str(folder / request.param)
    config["run"]["output_dir"] = str(run)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(folder / f"{request.param}.txt", tmp_path / FILE)
    shutil.copy(folder / PAIRS, tmp_path / PAIRS)
    return run


@pytest.fixture
def ends(t5vae, recwarn):
    """Runs a command that must end with one of some exit codes, and in no more than a line."""

    def run(codes, *arguments):
        code, out, err = t5vae(*arguments)
        assert code in codes, (arguments, code, out, err)
        assert "Traceback" not in err
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (code == 2), err
        if code == 2:
            assert err.splitlines()[-1] == errors[0]
        told = [w for w in recwarn if not issubclass(w.category, ResourceWarning)]
        assert [str(warning.message) for warning in told] == []
        return code, out, err

    return run


@pytest.mark.parametrize("name", SIZES)
def test_shards_are_verified_and_shown(folder, name, ends):
    count, held_out = SIZES[name]
    ends(WORKS, "shards", "verify", folder / name)
    _, out, _ = ends(WORKS, "shards", "inspect", folder / name, "--json")
    splits = json.loads(out)["splits"]
    assert sum(split["sequences"] for split in splits.values()) == count
    assert ("valid" in splits) == (held_out > 0)
    ends(WORKS, "shards", "inspect", folder / name)
    ends(WORKS, "shards", "inspect", folder / name, "--position", 7, "--batch", 2)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("held_out", [0.0, 0.5])
def test_one_or_two_lines_are_built_or_refused_in_a_line(tmp_path, ends, count, held_out):
    (tmp_path / "lines.txt").write_text("\n".join(LINES[:count]))
    options = ("--tokenizer", "byte", "--max-length", 24, "--valid-fraction", held_out)
    out = ("--out", tmp_path / "data", "--workers", 1)
    code, _, _ = ends(
        {0, 2} if held_out else WORKS, "shards", "build", tmp_path / "lines.txt", *out, *options
    )
    if code == 0:
        assert shards.verify(tmp_path / "data").ok
        assert shards.open_index(tmp_path / "data").sequences("train") > 0


def test_a_run_is_shown_and_planned(run, ends):
    ends(WORKS, "config", "show", run / "config.yaml")
    ends(WORKS, "plan", run / "config.yaml")


def test_every_command_works_or_says_why_not(run, tmp_path, ends, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ends(WORKS, "encode", run, "--file", FILE, "--out", CODES)
    for (command, *arguments), codes in COMMANDS:
        where = [run.parent] if command == "runs" else [run]
        ends(codes, command, *where, *arguments)
    config = yaml.safe_load((run / "config.yaml").read_text())
    index = shards.open_index(config["data"]["shards"])
    few = {"gaussian", "gmm"} if index.sequences("train") < 2 else set()
    for prior in PRIORS:
        codes = REFUSED if prior in few | {"flow"} else WORKS
        ends(codes, "sample", run, "-n", 3, "--prior", prior, "--check", "python")
    _, _, err = ends(REFUSED, "eval", run)
    held_out = "valid" in index.splits
    assert ("at least 4 held-out" if held_out else "--valid-fraction above 0") in err
