"""Small files: whole or not at all, and damage in one line."""

import os
from pathlib import Path

import pytest

from t5vae.common.errors import UserError
from t5vae.common.files import read_records, write_records, write_whole

RECORDS = [{"step": n, "text": "é\u2028"} for n in range(100)]


def test_what_was_written_is_read_without_a_line_that_a_crash_cut(tmp_path):
    file = tmp_path / "lines.jsonl"
    assert read_records(file) == []
    write_records(file, RECORDS)
    with open(file, "a") as whole:
        whole.write('{"step": 100, "te')
    assert read_records(file) == RECORDS


@pytest.mark.parametrize("tail", [1, 40, 41, 500, 10**6])
def test_the_tail_holds_whole_lines_alone(tmp_path, tail):
    file = tmp_path / "lines.jsonl"
    write_records(file, RECORDS)
    found = read_records(file, tail)
    lines = file.read_bytes()[-tail:].count(b"\n")
    assert len(found) in (lines, lines - 1)
    assert found == RECORDS[len(RECORDS) - len(found) :]


@pytest.mark.parametrize("content", [b"\xf2\x00\n", b'{"a": 1}\n[1]\n', b"none\n", b"\n"])
def test_damage_is_told_in_one_line(tmp_path, content):
    file = tmp_path / "lines.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"lines\.jsonl is damaged, or no file of a run"):
        read_records(file)
    with pytest.raises(UserError, match="cannot read"):
        read_records(tmp_path)


def test_a_write_that_fails_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_whole(file, "old")

    def full(self: Path, *_: object, **__: object) -> None:
        self.touch()
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "old"
