"""What the benchmarks share to report: targets, turns, and pages filled between their marks."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"^<!-- (.*) -->$", re.M)
PAGES = [ROOT / "docs/quality.md", *sorted((ROOT / "docs/benchmarks").glob("*.md"))]


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT))  # `shards` is the package
    import _report

    return _report


def test_only_what_lies_between_a_blocks_marks_is_replaced(report):
    page = "words\n\n<!-- a -->\n\nold\n\n<!-- end -->\n\nmore\n\n<!-- b -->\nkept\n<!-- end -->\n"
    found = report.filled(page, [report.Block("a", "new\n")])
    assert found == page.replace("old", "new")
    assert report.filled(found, [report.Block("a", "new\n")]) == found


def test_a_block_that_a_page_has_no_place_for_is_told(report):
    with pytest.raises(ValueError, match="no <!-- a -->"):
        report.filled("words", [report.Block("a", "new")])


def test_a_page_that_is_renewed_whole_is_not_written_in_part(report, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["model.py", "--write", "--only", "a"])
    with pytest.raises(SystemExit):
        report.Page("Measure.", "benchmarks/model.md", only=("a", "b")).options()
    assert "--write saves whole runs" in capsys.readouterr().err
    assert report.Page("Measure.", "x.md", only=("a", "b"), apart=True).options().only == ["a"]


def test_a_spread_is_the_median_and_the_range(report):
    assert report.spread([3, 1, 2], 1) == "2.0 (1.0 to 3.0)"
    assert report.spread([3], 1) == "3.0"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_mark_of_a_page_has_its_end_and_a_name_of_its_own(page):
    names = MARK.findall(page.read_text())
    assert names[1::2] == ["end"] * (len(names) // 2)
    assert len(set(names[::2])) == len(names) - len(names) // 2
