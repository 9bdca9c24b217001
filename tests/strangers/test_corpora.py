"""Corpora from a stranger: files that say they are larger than they are, or are."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

ZEROS = 2**27  # bytes of a bomb: twice the longest line
BUILD = ("--out", "new/data", "--tokenizer", "byte", "--max-length", 16, "--workers", 1)


def bomb(name: str, byte: bytes, head: bytes = b"") -> Callable[[Path], None]:
    """A file of gigabytes of one byte, or of two."""

    def write(folder: Path) -> None:
        piece = byte * (2**24 // len(byte))
        if name.endswith(".zst"):
            with zstandard.open(folder / name, "wb") as file:
                file.write(head)
                for _ in range(ZEROS // 2**24):
                    file.write(piece)
            return
        # Members of a gzip file are read one after the other.
        member = gzip.compress(piece, 1)
        (folder / name).write_bytes(gzip.compress(head) + member * (ZEROS // 2**24 + 1))

    return write


def sparse(name: str, size: int = 100 * 2**30) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, size)

    return write


def tar(
    *members: tuple[tarfile.TarInfo | str, bytes], after: bytes = b""
) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        with tarfile.open(folder / "x.tar", "w") as file:
            for header, content in members:
                if isinstance(header, str):
                    header = tarfile.TarInfo(header)
                    header.size = len(content)
                file.addfile(header, io.BytesIO(content))
        if after:
            content = (folder / "x.tar").read_bytes()
            (folder / "x.tar").write_bytes(after + content)

    return write


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, **more: object) -> bytes:
    """A header of a tar member alone."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for key, value in more.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def npy(descr: str, shape: tuple[int, ...], content: bytes = b"") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return file.getvalue() + content


def pickled() -> bytes:
    class Evil:
        def __reduce__(self) -> object:
            return os.system, ("touch unpickled",)

    file = io.BytesIO()
    np.save(file, np.array([Evil()], object), allow_pickle=True)
    return file.getvalue()


def lines(name: str, *rows: str) -> Callable[[Path], None]:
    return lambda folder: bool((folder / name).write_text("".join(f"{row}\n" for row in rows)))


# What is refused in one line. A file's name is the source.
REFUSED = {
    "zeros.txt": sparse("zeros.txt"),
    "zeros.jsonl": sparse("zeros.jsonl"),
    "zeros.csv": sparse("zeros.csv"),
    "zeros.parquet": sparse("zeros.parquet"),
    "one line.txt.gz": bomb("one line.txt.gz", b"x"),
    "one line.txt.zst": bomb("one line.txt.zst", b"x"),
    "one line.jsonl.gz": bomb("one line.jsonl.gz", b"[", b'{"text": "x"}\n'),
    "one line.csv.gz": bomb("one line.csv.gz", b"x", b"text\n"),
    "one row.csv.gz": bomb("one row.csv.gz", b"x,", b"text\n"),
    "one header.csv.gz": bomb("one header.csv.gz", b"x,"),
    "deep.jsonl": lines("deep.jsonl", '{"text": ' + "[" * 10**5),
    "digits.jsonl": lines("digits.jsonl", '{"text": ' + "9" * 10**5 + "}"),
    "half.jsonl": lines("half.jsonl", '{"text": "\\ud800"}'),
}
TARS = {
    "a huge member": tar(after=header("a.txt", 2**40)),
    "a huge name": tar(after=header("././@LongLink", 2**33, tarfile.GNUTYPE_LONGNAME)),
    "huge attributes": tar(after=header("x", 2**33, tarfile.XHDTYPE)),
    "negative": tar(after=header("a.txt", -5)),
    "headers of headers": tar(after=header("x", 0, tarfile.XHDTYPE) * 5000),
    "a huge array": tar(("a.npy", npy("<i4", (2**40,)))),
    "a huge array of nothing": tar(("a.npy", npy("|V0", (2**60,)))),
    "a negative array": tar(("a.npy", npy("<i4", (-1,)))),
    "a pickle": tar(("a.npy", pickled())),
    "an array of two dimensions": tar(("a.npy", npy("<i4", (1, 1), bytes(4)))),
    "ids beyond": tar(("a.npy", npy("<i8", (1,), b"\xff" * 7 + b"\x7f"))),
    "a link": tar(after=header("a.txt", 0, tarfile.SYMTYPE, linkname="/etc/passwd")),
    "a device": tar(after=header("a.txt", 0, tarfile.CHRTYPE)),
}


@pytest.fixture
def stopped(command) -> Callable[..., str]:
    """Builds a dataset, which must be refused and do nothing; returns the last line."""

    def run(source: str, *arguments: object) -> str:
        done = command("shards", "build", source, *BUILD, *arguments)
        assert done.deeds == []
        assert done.code == 2, done.out + done.err
        assert done.out == ""
        *said, line = done.err.splitlines()
        assert len(said) <= 2, done.err
        assert line.startswith("error: ")
        assert not Path("new/data").exists()
        return line

    return run


@pytest.mark.parametrize("name", REFUSED)
def test_a_corpus_that_is_too_large_or_none_is_refused(handed, stopped, name):
    REFUSED[name](handed.folder)
    column = () if ".txt" in name else ("--column", "text")
    stopped(name, *column)


@pytest.mark.parametrize("evil", TARS)
def test_a_tar_file_that_is_none_of_a_dataset_is_refused(handed, stopped, evil):
    TARS[evil](handed.folder)
    stopped("x.tar")
    assert not Path("unpickled").exists()


def test_a_member_of_gigabytes_is_refused(handed, stopped):
    bomb("y.tar.gz", b"x", header("b.txt", ZEROS + 2**24))(handed.folder)
    with open(handed.folder / "y.tar.gz", "ab") as file:
        file.write(gzip.compress(bytes(1024)))
    assert "more than 64 MiB" in stopped("y.tar.gz")


def test_members_are_named_and_not_extracted(handed, honest):
    names = ("../up.txt", "/tmp/absolute-evil.txt", "a/../../b.txt", "c.txt")
    tar(*((name, f"text of {n}".encode()) for n, name in enumerate(names)))(handed.folder)
    honest("shards", "build", "x.tar", *BUILD)
    assert not Path("/tmp/absolute-evil.txt").exists()
    assert not (handed.folder.parent / "up.txt").exists()
    index = json.loads(Path("new/data/index.json").read_text())
    assert index["texts_read"] == len(names)


def test_lines_after_one_that_is_too_long_are_read(handed, command, monkeypatch):
    monkeypatch.setattr("shards.write.formats.csv.LONGEST", 1000)
    monkeypatch.setattr("shards.write.formats.csv.CHUNK", 300)
    rows = ["text", "a", "x" * 5000, "b", '"c', "y" * 5000, 'd"', "e", "z" * 999]
    lines("x.csv", *rows)(handed.folder)
    done = command("shards", "build", "x.csv", *BUILD, "--column", "text", "--bad-rows", "skip")
    assert (done.code, done.deeds) == (0, [])
    # The quote that is opened before a long line is closed by none: a row that is none, too.
    assert [line.partition(":")[2] for line in done.err.splitlines() if "left out" in line] == [
        f" x.csv, line {number}: {why}"
        for number, why in (
            (3, "a line of more than 64 MiB"),
            (5, "a line of more than 64 MiB"),
            (6, "a line of more than 64 MiB"),
        )
    ]


def test_a_file_of_code_that_is_too_long_is_passed_over(handed, honest):
    sparse("evil.py", ZEROS)(handed.folder)
    lines("fine.py", "x = 1", "y = x + 1")(handed.folder)
    (handed.folder / "code").mkdir()
    for name in ("evil.py", "fine.py"):
        Path(name).rename(f"code/{name}")
    honest("shards", "build", "code", "--format", "python", *BUILD)
    index = json.loads(Path("new/data/index.json").read_text())
    assert index["dropped"] == {"unparsable file": 1}
