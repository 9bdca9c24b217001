"""The commands on a latent space, on a tiny random model: what they print, keep and refuse."""

import json
import shutil

import numpy as np
import pytest

from t5vae.common.kinds import PRIORS
from t5vae.latent import LatentSpace
from t5vae.latent.priors.flow import Flow
from tests.latent import tiny

TEXTS = ["x = 1", "print(é)", "", "[b]return[/b]"]
LONG = "long " * 20


@pytest.fixture
def run(used_run, tmp_path):
    return shutil.copytree(used_run, tmp_path / "run")


@pytest.fixture
def space(run):
    return LatentSpace.load(run, device="cpu")


SEEDED = {
    "decode": ["RUN", "-", "--temperature", "1"],
    "sample": ["RUN", "-n", "2", "--temperature", "1", "--check", "regex:(?s).*"],
    "neighbors": ["RUN", "x = 1", "-n", "2"],
    "optimize": ["RUN", "x = 1", "--property", "length", "-n", "1"],
}


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(text + "\n" for text in TEXTS))
    return path


def test_texts_come_from_arguments_a_file_or_standard_input(ok, run, lines, tmp_path):
    full = [text for text in TEXTS if text]
    expected, _ = ok("encode", run, *full)
    assert len(expected.splitlines()) == 3
    assert ok("encode", run, "--file", lines)[0] == expected
    stdin = "\n".join(full).encode()
    assert ok("encode", run, stdin=stdin)[0] == expected
    assert ok("encode", run, "-", stdin=stdin)[0] == expected
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps({"n": 1, "code": text}) + "\n" for text in full))
    assert ok("encode", run, "--file", table, "--column", "code")[0] == expected
    assert ok("encode", run / "export", *full)[0] == expected


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 2**64 - 1, -(2**63)])
@pytest.mark.parametrize("command", SEEDED)
def test_a_seed_of_64_bits_is_one(ok, used_run, command, seed):
    arguments = [used_run if word == "RUN" else word for word in SEEDED[command]]
    ok(command, *arguments, "--seed", seed, stdin=json.dumps([[0.0] * 6]).encode())


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
@pytest.mark.parametrize("command", SEEDED)
def test_a_seed_of_more_is_refused(error_line, used_run, command, seed):
    arguments = [used_run if word == "RUN" else word for word in SEEDED[command]]
    assert f"--seed is {seed}" in error_line(command, *arguments, "--seed", seed)


def test_codes_go_out_and_come_back_in_every_form(ok, document, run, space, lines, tmp_path):
    reconstructed = space.reconstruct(TEXTS)
    encoded, _ = ok("encode", run, *TEXTS, "--json")
    assert json.loads(encoded)["latent_size"] == 6
    assert [row["text"] for row in json.loads(encoded)["texts"]] == TEXTS
    assert document("decode", run, stdin=encoded.encode())["texts"] == reconstructed
    (tmp_path / "codes.json").write_text(encoded)
    assert document("decode", run, tmp_path / "codes.json")["texts"] == reconstructed
    rows = [row["code"] for row in json.loads(encoded)["texts"]]
    assert document("decode", run, "-", stdin=json.dumps(rows).encode())["texts"] == reconstructed
    np.save(tmp_path / "codes.npy", np.array(rows))
    out, _ = ok("decode", run, tmp_path / "codes.npy")
    assert out == "".join(text + "\n" for text in reconstructed)
    three = document("decode", run, tmp_path / "codes.npy", "-n", 3, "--temperature", 1)["texts"]
    assert [len(candidates) for candidates in three] == [3] * 4


def test_a_file_is_encoded_into_a_folder_that_other_commands_take(ok, document, run, tmp_path):
    lines, out = tmp_path / "many.txt", tmp_path / "codes"
    lines.write_text("\n".join([*tiny.LINES, LONG, tiny.LINES[3]]) + "\n")
    printed, err = ok("encode", run, "--file", lines, "--out", out)
    assert printed == f"121 codes: {out}\n"
    assert "left out: 1 (too many tokens)" in err
    found = document("encode", run, "--file", lines, "--out", out)
    why = {"left_out": 1, "reasons": {"too many tokens": 1}}
    assert found == {"folder": str(out), "sequences": 121, **why}
    near = document("nearest", run, tiny.LINES[7], "-n", 2, "--corpus", out)["texts"][0]["nearest"]
    assert near[0]["text"] == tiny.LINES[7]
    decoded = document("decode", run, out)["texts"]
    assert len(decoded) == 121
    repeats = document("dedupe", run, "--corpus", out, "--radius", 0)["repeats"]
    assert {"text": tiny.LINES[3], "row": 121, "repeats": tiny.LINES[3]} in repeats


def test_reconstructions_show_what_changed(ok, document, run, space):
    rows = document("reconstruct", run, *TEXTS)["texts"]
    assert [row["reconstruction"] for row in rows] == space.reconstruct(TEXTS)
    for row in rows:
        assert "".join(part["old"] for part in row["parts"]) == row["text"]
        assert "".join(part["new"] for part in row["parts"]) == row["reconstruction"]
    out, err = ok("reconstruct", run, *TEXTS)
    assert "[-x = 1-]" in out
    assert "[-[b]return[/b]-]" in out
    assert "0 of 4 came back exactly" in err


def test_a_path_and_a_square(ok, document, run, space):
    out, _ = ok("interpolate", run, "x = 1", "y", "--steps", 3)
    texts = space.interpolate("x = 1", "y", 3)
    assert out == "".join(
        f"{at}  {text}\n" for at, text in zip(("0.00", "0.50", "1.00"), texts, strict=True)
    )
    found = document("grid", run, *TEXTS, "--steps", 3, "--method", "slerp")
    assert found["texts"] == space.grid(*TEXTS, steps=3, method="slerp")
    assert len(ok("grid", run, *TEXTS, "--steps", 2)[0].splitlines()) == 5


@pytest.mark.parametrize("prior", PRIORS)
def test_samples_are_counted(ok, document, run, prior, monkeypatch):
    monkeypatch.setattr(Flow, "STEPS", 20)
    how = ("-n", 6, "--prior", prior, "--temperature", 1, "--check", "regex:.*[a-m].*")
    found = document("sample", run, *how)
    assert len(found["texts"]) == 6
    assert all(set(text) & set("abcdefghijklm") for text in found["texts"])
    out, err = ok("sample", run, *how)
    assert out == "".join(text + "\n" for text in found["texts"])
    assert f"6 of {found['drawn']} drawn passed regex:" in err


def test_commands_of_so_many_texts_read_them_from_a_file_or_standard_input(ok, run, lines):
    lines.write_text("".join(text + "\n" for text in tiny.LINES[:4]))
    for command, count, options in (
        ("interpolate", 2, ["--steps", 3]),
        ("grid", 4, ["--steps", 2]),
        ("neighbors", 1, ["-n", 5]),
        ("optimize", 1, ["--property", "length"]),
    ):
        texts = tiny.LINES[:count]
        expected, _ = ok(command, run, *texts, *options)
        assert ok(command, run, *options, stdin="\n".join(texts).encode())[0] == expected
        if count == 4:
            assert ok(command, run, *options, "--file", lines)[0] == expected


def test_neighbours_are_counted(document, ok, run, space):
    found = document("neighbors", run, "x = 1", "-n", 8, "--radius", 0)
    assert found["texts"] == [{"text": space.reconstruct(["x = 1"])[0], "points": 8}]
    assert "8" in ok("neighbors", run, "x = 1", "-n", 8, "--radius", 0)[0]


def test_a_direction_from_a_file_of_pairs(document, ok, run, space, tmp_path):
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("x = 1\tx = 2\na = 1\ta = 2\n")
    strengths = ("--strength", 0, "--strength", 2.5)
    found = document("direction", run, "--pairs", pairs, "y = 1", *strengths)
    direction = space.direction([("x = 1", "x = 2"), ("a = 1", "a = 2")])
    moved = [direction.apply(["y = 1"], strength)[0] for strength in (0, 2.5)]
    assert found["texts"] == [{"text": "y = 1", "moved": moved}]
    assert found["consistency"] == pytest.approx(direction.consistency, abs=1e-6)
    assert "2 pairs" in ok("direction", run, "--pairs", pairs, "y = 1", *strengths)[1]


def test_a_property_is_fitted_kept_and_optimised(document, ok, run, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text(
        "text,value\n" + "".join(f'"{text}",{i}\n' for i, text in enumerate(tiny.LINES))
    )
    how = ("--file", table, "--column", "text", "--values", "value")
    fitted = document("fit-property", run, "number", *how)
    assert (fitted["name"], fitted["n"]) == ("number", 120)
    assert fitted["file"] == str(run / "latent" / "properties" / "number.safetensors")
    found = document("optimize", run, "x = 1", "--property", "number", "--target", 60, "-n", 3)
    assert found["goal"] == 60
    assert found["start"]["text"] == "x = 1"
    assert all(each["value"] is None for each in found["candidates"])
    out, err = ok("optimize", run, "x = 1", "--property", "length", "--min")
    assert out.count("x = 1") == 1
    assert "length is predicted with R²" in err
    out, _ = ok("fit-property", run, "letters", "--function", "length", "--kind", "mlp")
    assert out.startswith("letters, by mlp on ")


def test_outliers_come_first(document, ok, run, space):
    texts = [*tiny.LINES[:5], LONG, "", "zzzz"]
    found = document("outliers", run, *texts)
    scores = [row["score"] for row in found["texts"]]
    assert scores == sorted(scores, reverse=True)
    assert (len(scores), found["left_out"]) == (7, 1)
    out, err = ok("outliers", run, *texts, "-n", 2)
    assert [line.split("  ", 1)[1] for line in out.splitlines()] == [
        row["text"] for row in found["texts"][:2]
    ]
    assert "left out: 1 (too many tokens)" in err


def test_repeats_are_left_out(document, ok, run):
    texts = ["x = 1", "print(y)", "x = 1", LONG]
    out, err = ok("dedupe", run, *texts, "--radius", 0)
    assert out == "x = 1\nprint(y)\n"
    assert "2 of 3 texts kept" in err
    found = document("dedupe", run, *texts, "--radius", 0)
    assert found["repeats"] == [{"text": "x = 1", "repeats": "x = 1"}]


MISTAKES = {
    "two sources of texts": (["encode", "RUN", "x", "--file", "LINES"], "give one of them"),
    "a column of nothing": (["encode", "RUN", "x", "--column", "c"], "--column names a field"),
    "no file": (["outliers", "RUN", "--file", "DIR/none.txt"], "none.txt"),
    "a binary file": (["reconstruct", "RUN", "--file", "DIR/binary.txt"], "binary.txt"),
    "an empty file": (["dedupe", "RUN", "--file", "DIR/empty.txt"], "empty.txt"),
    "a long text": (["interpolate", "RUN", "x", LONG], "40 at most"),
    "only long texts": (["outliers", "RUN", LONG], "no text has up to 40 tokens"),
    "a device": (["encode", "RUN", "x", "--device", "cuda:77"], "no device 'cuda:77'"),
    "codes of words": (["decode", "RUN", "DIR/words.json"], "words.json holds no codes"),
    "codes of another size": (["decode", "RUN", "DIR/short.json"], "have 2 numbers each, the mo"),
    "one code": (["decode", "RUN", "DIR/flat.json"], "rows of finite numbers"),
    "an infinite code": (["decode", "RUN", "DIR/infinite.json"], "rows of finite numbers"),
    "pickled codes": (["decode", "RUN", "DIR/pickled.npy"], "pickled.npy holds no codes"),
    "a folder that is no corpus": (["decode", "RUN", "DIR"], "holds no codes"),
    "a corpus that is none": (["nearest", "RUN", "x", "--corpus", "DIR"], "is no encoded corpus"),
    "out of letters": (["encode", "RUN", "x", "--out", "DIR"], "is no encoded corpus"),
    "no pairs": (["direction", "RUN", "x", "--pairs", "DIR/none.tsv"], "none.tsv does not exist"),
    "empty pairs": (["direction", "RUN", "x", "--pairs", "DIR/empty.txt"], "at least one pair"),
    "pairs without tabs": (["direction", "RUN", "x", "--pairs", "LINES"], "line 1: a pair is two"),
    "a checker": (["sample", "RUN", "--check", "pyhton"], "unknown checker 'pyhton'"),
    "nothing valid": (["sample", "RUN", "-n", "1", "--check", "regex:@@@@"], "only 0 of 2000 sam"),
    "no property": (["optimize", "RUN", "x", "--property", "taste"], "no property 'taste' is kept"),
    "two goals": (
        ["optimize", "RUN", "x", "--property", "length", "--min", "--target", "3"],
        "--min and --target: give one of them",
    ),
    "radius 0": (
        ["optimize", "RUN", "x", "--property", "length", "--radius", "0"],
        "the radius of the search is 0.0",
    ),
    "three ends": (["interpolate", "RUN", "a", "b", "c"], "texts needed: 2, given: 3"),
    "a file of two for one": (["neighbors", "RUN", "--file", "LINES"], "texts needed: 1, given: 3"),
    "an endless step": (["neighbors", "RUN", "x", "--radius", "inf"], "codes are finite numbers"),
    "an endless heat": (["sample", "RUN", "--temperature", "inf"], "the temperature is inf"),
    "too little heat": (["sample", "RUN", "--temperature", "1e-9"], "give 0, or 1e-06 and more"),
    "no goal": (
        ["optimize", "RUN", "x", "--property", "length", "--target", "nan"],
        "the goal of the search is nan",
    ),
    "no such measure": (["fit-property", "RUN", "taste"], "unknown measure 'taste'"),
    "values of nothing": (
        ["fit-property", "RUN", "p", "--values", "v"],
        "--values needs the texts",
    ),
    "values twice": (
        ["fit-property", "RUN", "p", "--values", "v", "--function", "length"],
        "--values and --function: give one of them",
    ),
    "a name with a path": (
        ["fit-property", "RUN", "../p", "--function", "length"],
        "a property cannot be kept as '../p'",
    ),
    "two corpora": (["dedupe", "RUN", "x", "--corpus", "DIR"], "texts and --corpus: give one"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_changed(t5vae, used_run, lines, tmp_path, mistake):
    arguments, message = MISTAKES[mistake]
    given = tmp_path / "given"
    given.mkdir()
    (given / "binary.txt").write_bytes(b"a\n\xff\xfe\x00\n")
    (given / "empty.txt").write_text("")
    (given / "words.json").write_text('["a", "b"]')
    (given / "short.json").write_text("[[1, 2]]")
    (given / "flat.json").write_text("[1, 2, 3, 4, 5, 6]")
    (given / "infinite.json").write_text("[[1, 2, 3, 4, 5, Infinity]]")
    np.save(given / "pickled.npy", np.array([{"a": 1}]), allow_pickle=True)
    before = {path: path.stat().st_mtime_ns for path in (*used_run.rglob("*"), *given.iterdir())}
    places = {"RUN": str(used_run), "LINES": str(lines), "DIR": str(given)}
    arguments = [places.get(word, word.replace("DIR/", f"{given}/")) for word in arguments]
    if "--device" not in arguments:
        arguments += ["--device", "cpu"]
    code, out, err = t5vae(*arguments)
    lines_of_error = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert len(lines_of_error) == 1
    assert message in lines_of_error[0]
    assert "Traceback" not in err
    assert out == ""
    after = {path: path.stat().st_mtime_ns for path in (*used_run.rglob("*"), *given.iterdir())}
    assert after == before
