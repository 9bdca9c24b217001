"""A run's evaluation as files and commands: eval.json, eval.html, the comparison."""

import hashlib
import json
import re
import shutil
from base64 import b64decode
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest

import shards
from t5vae.evaluation import comparison, differences, evaluate_run, read_report
from t5vae.evaluation.tables import ROWS, value_at
from tests.latent import tiny

FEW = {"sequences": 8, "samples": 20, "interpolations": 3}
OPTIONS = [part for name, count in FEW.items() for part in (f"--{name}", count)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run and its evaluation. Not to be changed."""
    run = tiny.run_folder(tmp_path_factory.mktemp("evaluated"))
    lines = [{"step": step, "loss": 3 / step, "eval/valid": 0.5} for step in (10, 20, 30)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate_run(run, check="python", **FEW)
    return run


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


class Page(HTMLParser):
    """Collects a page's tags and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def images(self):
        return [attributes["src"] for tag, attributes in self.tags if tag == "img"]


def test_the_page_needs_nothing_but_itself(made):
    page = Page((made / "eval.html").read_text())
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert len(page.images) == 6
    for source in page.images:
        assert source.startswith("data:image/svg+xml;base64,")
        assert b64decode(source.partition(",")[2]).lstrip().startswith(b"<?xml")
    linked = {name for _, attributes in page.tags for name in attributes}
    assert "href" not in linked


def test_the_page_shows_every_figure_and_example(made):
    report = json.loads((made / "eval.json").read_text())
    words = "".join(Page((made / "eval.html").read_text()).words)
    for row in ROWS:
        assert row.meaning.format(measure="length") in words
    for sample in report["examples"]["samples"]:
        assert sample["text"].strip() in words
    marks = words.count("✓") + words.count("✗")
    shown = report["examples"]
    steps = sum(map(len, shown["interpolations"]))
    assert marks == len(shown["samples"]) + len(shown["reconstructions"]) + steps
    for sentence in report["alarms"].values():
        assert sentence in words
    assert report["alarms"]


def test_texts_cannot_break_the_page(made):
    from t5vae.evaluation.page import page

    report = json.loads((made / "eval.json").read_text())
    evil = "<script>alert('a')</script> & {{ 7 * 7 }}"
    report["examples"]["samples"][0]["text"] = evil
    html = page(report, evil)
    assert "<script" not in html
    assert evil in unescape(html)
    assert "curves" not in html.lower().replace("curves of the training", "")


def test_curves_of_another_time_are_drawn_if_there_are_any(made, run):
    assert "Curves of the training run" in (made / "eval.html").read_text()
    (run / "metrics.jsonl").unlink()
    (run / "eval.html").unlink()
    evaluate_run(run, check="python", **FEW)
    assert "Curves of the training run" not in (run / "eval.html").read_text()


def test_a_known_evaluation_is_not_repeated(run):
    before = (run / "eval.json").stat().st_mtime_ns
    assert evaluate_run(run, check="python", **FEW)[1:] == (run, True)
    assert (run / "eval.json").stat().st_mtime_ns == before
    report, _, known = evaluate_run(run, check="python", measure="names", **FEW)
    assert not known
    assert report["measure"] == "names"
    (run / "eval.json").write_text("{")
    assert not evaluate_run(run, check="python", **FEW)[2]


def test_an_evaluation_that_does_not_tell_of_contamination_is_repeated(run):
    report = json.loads((run / "eval.json").read_text())
    assert report["contamination"] == report["n"].pop("contaminated") == 0
    (run / "eval.json").write_text(json.dumps({**report, "contamination": None}))
    assert evaluate_run(run, check="python", **FEW)[2]
    del report["contamination"]
    (run / "eval.json").write_text(json.dumps(report))
    assert read_report(run) == report
    again, _, known = evaluate_run(run, check="python", **FEW)
    assert not known
    assert again["contamination"] == 0


def hold_out_training_sequences(folder):
    """Make a dataset's split valid a copy of its split train."""
    index = json.loads((folder / "index.json").read_text())
    train, valid = index["shards"]
    shutil.copy(folder / train["name"], folder / valid["name"])
    index["shards"][1] = {**train, "name": valid["name"], "split": "valid"}
    index["splits"]["valid"] = index["splits"]["train"]
    blocks = np.load(folder / "blocks.npy")
    of_train = blocks[blocks["shard"] == 0]
    of_valid = of_train.copy()
    of_valid["shard"] = 1
    np.save(folder / "blocks.npy", np.concatenate([of_train, of_valid]))
    digest = hashlib.sha256((folder / "blocks.npy").read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps({**index, "blocks_sha256": digest}))


def test_shards_that_hold_out_training_sequences_are_told(made, tmp_path, t5vae):
    alone = shutil.copytree(made / "export", tmp_path / "alone")
    data = shutil.copytree(made.parent / "data", tmp_path / "data")
    hold_out_training_sequences(data)
    assert shards.verify(data).ok
    code, out, _ = t5vae("eval", alone, "--shards", data, *OPTIONS)
    assert code == 0
    told = "8 of 8 held-out sequences are in the training set too"
    assert f"alarm: {told}" in " ".join(out.split())
    assert told in "".join(Page((alone / "eval.html").read_text()).words)


def test_the_training_set_is_never_held(run, monkeypatch):
    read, blocks, passes = shards.Dataset.read, shards.Dataset.blocks, []

    def only_held_out(dataset, split, numbers):
        assert split == "valid"
        return read(dataset, split, numbers)

    def counted(dataset, split, numbers=None):
        passes.append("all" if numbers is None else "sample")
        return blocks(dataset, split, numbers)

    monkeypatch.setattr(shards.Dataset, "read", only_held_out)
    monkeypatch.setattr(shards.Dataset, "blocks", counted)
    (run / "eval.json").unlink()
    evaluate_run(run, check="python", **FEW)
    assert sorted(passes) == ["all", "sample"]


def test_an_export_of_a_run_is_the_run(run):
    assert evaluate_run(run / "export", check="python", **FEW)[1:] == (run, True)


def test_an_export_alone_is_evaluated_on_shards_that_are_given(made, tmp_path, error_line, t5vae):
    alone = shutil.copytree(made / "export", tmp_path / "alone")
    assert "--shards" in error_line("eval", alone)
    code, out, _ = t5vae(
        *("eval", alone, "--shards", made.parent / "data", "--check", "python"), *OPTIONS, "--json"
    )
    assert code == 0
    report, own = json.loads(out), json.loads((made / "eval.json").read_text())
    assert report == own
    assert (alone / "eval.html").is_file()


def test_shards_that_do_not_fit_the_model_are_refused(run, tmp_path, error_line):
    (tmp_path / "lines.txt").write_text("\n".join(tiny.LINES))
    shards.build(tmp_path / "lines.txt", tmp_path / "other", tokenizer="train:300", max_length=40)
    assert "another tokenizer" in error_line("eval", run, "--shards", tmp_path / "other")
    shards.build(tmp_path / "lines.txt", tmp_path / "long", tokenizer="byte", max_length=60)
    assert "up to 60 tokens" in error_line("eval", run, "--shards", tmp_path / "long")


def test_the_command_prints_alarms_and_where_the_page_is(run, t5vae):
    code, out, _ = t5vae("eval", run, "--check", "python", *OPTIONS)
    assert code == 0
    assert "already evaluated" in out
    assert str(run / "eval.html") in out
    assert re.search(r"^alarm: ", out, re.MULTILINE)


def test_compare_puts_runs_side_by_side(made, run, t5vae):
    code, out, err = t5vae("compare", made, run)
    assert code == 0
    assert err == ""
    report = read_report(made)
    line = next(line for line in out.splitlines() if "edit similarity" in line)
    assert line.count(f"{report['edit_similarity']:.3f}") == 2
    evaluate_run(run, check="json", **FEW | {"samples": 5})
    _, out, err = t5vae("compare", made, run)
    assert "check, n" in err
    code, out, _ = t5vae("compare", made, run, "--json")
    assert list(json.loads(out)) == [str(made), str(run)]


def test_the_best_of_a_row_is_bold_where_there_is_a_best(made):
    good, bad = (json.loads((made / "eval.json").read_text()) for _ in range(2))
    bad |= {"exact_match": -1.0, "nats_per_token": 1e9, "mean_square_norm": 9.0}
    bad["valid"] = None
    grid = comparison(["good", "bad"], [good, bad])
    names, *columns = (list(column.cells) for column in grid.columns)
    bold = {
        name: [str(column[at].style) == "bold" for column in columns]
        for at, name in enumerate(names)
    }
    assert bold["exact match"] == bold["nats per token"] == bold["valid"] == [True, False]
    assert bold["mean square norm"] == [False, False]
    assert bold["edit similarity"] == [True, True]
    assert differences([good, bad]) == []


def test_reports_that_cannot_be_compared_are_refused(run, error_line):
    (run / "eval.json").write_text('{"schema_version": 1}')
    assert "version 1" in error_line("compare", run)
    (run / "eval.json").write_text("\x00")
    assert "damaged" in error_line("compare", run)
    (run / "eval.json").unlink()
    assert "t5vae eval" in error_line("compare", run)


def test_every_row_is_in_a_report_with_an_interval(made):
    report = read_report(made)
    for row in ROWS:
        if row.name in ("interpolation.directness", "interpolation.largest_step"):
            continue  # an untrained model's paths never change
        low, high = value_at(report["intervals"], row.name)
        assert low <= value_at(report, row.name) <= high, row.name
        if row.control:
            assert value_at(report["controls"], row.control) is not None, row.control


@pytest.mark.parametrize("content", ["", "{", '{"step": 1}\n'])
def test_metrics_that_cannot_be_drawn_do_not_hinder_an_evaluation(run, content):
    (run / "metrics.jsonl").write_text(content)
    (run / "eval.html").unlink()
    evaluate_run(run, check="python", **FEW)
    assert "Curves of the training run" not in (run / "eval.html").read_text()
