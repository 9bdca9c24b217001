"""Parts of a build, made apart and joined: the bytes of a build in one go."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import shards
from shards.cli import app
from t5vae.common.errors import DamageError, UserError
from tests.shards.sources import write_tar
from tests.shards.test_splits import CASED, normalising

OPTIONS = {"max_length": 24, "valid_fraction": 0.1, "block_size": 32, "shard_size": 8192}
BUILD = """
import sys, shards
source, out, options, *part = sys.argv[1:]
shards.build(source, out, part=tuple(map(int, part)), **eval(options))
"""


@pytest.fixture
def trained(dataset):
    return dataset / "tokenizer"


def tokens(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    rows = [draw.integers(3, 200, draw.integers(1, 40)).astype("<i4") for _ in range(300)]
    write_tar(folder / "ids.tar", [{"npy": row} for row in rows + rows[:50]])
    return folder / "ids.tar"


def built_both_ways(source, folder, of, **options):
    """A build in one go, and one in parts from the last to the first."""
    shards.build(source, folder / "whole", **options)
    for number in range(of, 0, -1):
        assert shards.build(source, folder / "parts", part=(number, of), **options) is None
        assert not (folder / "parts").exists()
    shards.join(folder / "parts")
    assert sorted(p.name for p in folder.glob("*parts*")) == ["parts"]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("overflow", ["drop", "truncate", "split"])
def test_of_texts(parts, trained, tmp_path, digests, request, small, overflow):
    if small:
        request.getfixturevalue("small_parts")
    options = OPTIONS | {"overflow": overflow, "max_length": 12 if overflow != "drop" else 24}
    built_both_ways(parts, tmp_path, 5, tokenizer=trained, **options)
    assert digests(tmp_path / "whole") == digests(tmp_path / "parts")


@pytest.mark.parametrize("overflow", ["drop", "split"])
def test_of_a_tokenizer_that_loses_something(tmp_path, digests, overflow, small_parts):
    odd = [f"{{{n}}} é~{n % 7} [{'ü' * (n % 3)}]" for n in range(300)]
    (tmp_path / "a.txt").write_text("\n".join(CASED + odd))
    tokenizer = normalising(tmp_path / "tokenizer")
    options = OPTIONS | {"overflow": overflow, "max_length": 40 if overflow == "drop" else 6}
    built_both_ways(tmp_path / "a.txt", tmp_path, 5, tokenizer=tokenizer, **options)
    assert digests(tmp_path / "whole") == digests(tmp_path / "parts")
    assert shards.open_index(tmp_path / "parts").altered


@pytest.mark.parametrize("overflow", ["drop", "split"])
def test_of_token_ids(tmp_path, digests, overflow, small_parts):
    options = OPTIONS | {"overflow": overflow, "tokenizer": "byte", "format": "webdataset"}
    built_both_ways(tokens(tmp_path), tmp_path, 3, **options)
    assert digests(tmp_path / "whole") == digests(tmp_path / "parts")


def test_of_texts_that_are_not_deduplicated(parts, trained, tmp_path, digests, small_parts):
    built_both_ways(parts, tmp_path, 3, tokenizer=trained, dedupe=False, **OPTIONS)
    assert digests(tmp_path / "whole") == digests(tmp_path / "parts")
    with pytest.raises(UserError, match="--overflow would give another order"):
        shards.build(
            *(parts, tmp_path / "c"),
            **OPTIONS | {"overflow": "split", "tokenizer": trained, "dedupe": False},
            part=(1, 3),
        )


def test_of_more_parts_than_texts(tmp_path, digests):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    options = OPTIONS | {"tokenizer": "byte", "valid_fraction": 0}
    built_both_ways(tmp_path / "a.txt", tmp_path, 7, **options)
    assert digests(tmp_path / "whole") == digests(tmp_path / "parts")


def test_a_part_holds_its_share_alone(parts, tmp_path, small_parts):
    for number in (1, 2, 3, 4):
        shards.build(parts, tmp_path / "d", part=(number, 4), tokenizer="byte", **OPTIONS)
    documents = [
        json.loads((tmp_path / f".d.parts/{number}-of-4/part.json").read_text())
        for number in (1, 2, 3, 4)
    ]
    items = [sum(done["spool"]["items"] for done in document["read"]) for document in documents]
    assert max(items) < 0.3 * sum(items)


def test_machines_at_once_and_one_that_is_halted(
    parts, trained, tmp_path, digests, monkeypatch, capsys
):
    options = OPTIONS | {"tokenizer": str(trained), "overflow": "split", "max_length": 12}
    shards.build(parts, tmp_path / "whole", **options)
    out = tmp_path / "d"
    others = [
        subprocess.Popen([sys.executable, "-c", BUILD, parts, out, repr(options), str(k), "3"])
        for k in (1, 3)
    ]

    def halt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as later:
        later.setattr("shards.write.builder.finish_part", halt)
        with pytest.raises(KeyboardInterrupt):
            shards.build(parts, out, part=(2, 3), **options)
    assert [other.wait() for other in others] == [0, 0]
    with pytest.raises(UserError, match=r"lacks part 2 of 3: build it with --part 2/3"):
        shards.join(out)
    capsys.readouterr()
    shards.build(parts, out, part=(2, 3), **options)
    assert "going on with a halted build" in capsys.readouterr().err
    shards.build(parts, out, part=(2, 3), **options)
    assert "already built" in capsys.readouterr().err

    with monkeypatch.context() as later:
        later.setattr("shards.write.builder.finish", halt)
        with pytest.raises(KeyboardInterrupt):
            shards.join(out)
    shards.join(out)
    assert "going on with a halted build" in capsys.readouterr().err
    assert digests(out) == digests(tmp_path / "whole")
    shards.join(out)
    shards.build(parts, out, part=(2, 3), **options)  # the dataset is there
    assert capsys.readouterr().err.count("already built") == 2
    assert sorted(os.listdir(tmp_path)) == ["d", "whole"]


def test_parts_that_do_not_go_together(corpus, tmp_path):
    source, out = Path(shutil.copy(corpus, tmp_path)), tmp_path / "d"
    options = OPTIONS | {"tokenizer": "byte"}
    shards.build(source, out, part=(1, 2), **options)
    shards.build(source, out, part=(2, 2), **options | {"seed": 1})
    with pytest.raises(UserError, match="built with seed 1, not 0"):
        shards.join(out)
    with pytest.raises(UserError, match="built with seed 1, not 0: remove it"):
        shards.build(source, out, part=(2, 2), **options)
    shutil.rmtree(tmp_path / ".d.parts/2-of-2")
    source.write_text(source.read_text().replace("value_1 ", "valeu_1 "))
    shards.build(source, out, part=(2, 2), **options)
    with pytest.raises(UserError, match="built with another input"):
        shards.join(out)
    shutil.copytree(tmp_path / ".d.parts/1-of-2", tmp_path / ".e.parts/1-of-1")
    with pytest.raises(UserError, match="was made elsewhere"):
        shards.join(tmp_path / "e")


@pytest.mark.parametrize("size", [0, 9, 100])
@pytest.mark.parametrize(
    ("overflow", "suffix"), [("drop", ".npz"), ("split", ".rows"), ("split", ".items")]
)
def test_a_part_that_was_cut_off_is_named_and_built_again(
    corpus, tmp_path, digests, overflow, suffix, size
):
    options = OPTIONS | {"tokenizer": "byte", "max_length": 8 if overflow == "split" else 24}
    options |= {"overflow": overflow}
    shards.build(corpus, tmp_path / "whole", **options)
    for number in (1, 2):
        shards.build(corpus, tmp_path / "d", part=(number, 2), **options)
    part = tmp_path / ".d.parts/2-of-2"
    file = max(part.rglob(f"*{suffix}"), key=lambda path: path.stat().st_size)
    os.truncate(file, min(size, file.stat().st_size - 1))
    with pytest.raises(
        DamageError, match=rf"{file.stem}\.\w+ is damaged: remove {part}, and build"
    ):
        shards.join(tmp_path / "d")
    shutil.rmtree(part)
    shards.build(corpus, tmp_path / "d", part=(2, 2), **options)
    shards.join(tmp_path / "d")
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("given", "set_", "called"),
    [
        (["a *.txt", "o ut", "--seed", "1"], {"SLURM_ARRAY_TASK_MAX": "16"}, "3/16"),
        (["a *.txt", "o ut", "--seed", "1"], {"SLURM_ARRAY_TASK_MIN": "3", "PARTS": "9"}, "3/9"),
        (["--join", "o ut"], {}, None),
        (["a *.txt", "o ut"], {"SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "5"}, 2),
    ],
)
def test_the_job_script(tmp_path, given, set_, called):
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    script = Path(__file__).parents[2] / "slurm/build.sh"
    task = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "PATH": os.environ["PATH"]}
    job = subprocess.run(
        ["bash", script, *given], cwd=tmp_path, env=task | set_, capture_output=True, text=True
    )
    if called == 2:
        assert job.returncode == 2
        assert "--array=1-N" in job.stderr
        return
    build = ["build", "a *.txt", "--out", "o ut", "--part", called, "--seed", "1"]
    words = ["-u", "-P", "-m", "t5vae", "shards", *(build if called else ["join", "o ut"])]
    assert job.stdout.splitlines() == words


def test_mistakes_are_one_line(corpus, tmp_path):
    def said(*arguments):
        result = CliRunner().invoke(app, [*map(str, arguments)])
        assert isinstance(result.exception, UserError)
        return str(result.exception)

    build = ["build", corpus, "--out", tmp_path / "d", "--max-length", 9, "--tokenizer"]
    assert "build a dataset from a sample" in said(*build, "train:300", "--part", "1/2")
    for wrong in ("0/2", "3/2", "1/0", "2", "a/b", "1/99999"):
        assert "K/N" in said(*build, "byte", "--part", wrong)
    assert "has no parts to join" in said("join", tmp_path / "d")
