"""WebDataset tar files as a corpus."""

import gzip
import io
import tarfile

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.write.corpora import Corpus, combine
from t5vae.common.errors import UserError
from tests.shards.sources import read, reading, write_tar


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_webdataset_texts(tmp_path, suffix):
    records = [{"TXT": "two\nlines\n"}, {"txt": "\r\n"}, {"txt": "é", "jpg": b"\xff" * 3000}]
    tar = write_tar(tmp_path / "tar", records).read_bytes()
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    (tmp_path / f"a.tar{suffix}").write_bytes(pack(tar))
    (tmp_path / "notes.txt").write_text("no tar file")
    corpus = Corpus(tmp_path, "webdataset")
    assert (corpus.kind, corpus.column) == ("text", "txt")
    pass_over = reading(corpus)
    assert list(pass_over) == [["two\nlines", "é"]]
    assert pass_over.skipped == {"empty": 1}
    assert combine(pass_over.digests) == corpus.sha256()


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_webdataset_token_arrays(tmp_path):
    rows = [[3, 4, 1], [], [5, 2**31 - 1]]
    types = ["uint16", ">i8", "uint64"]
    records = [
        {"ids.npy": npy(np.array(row, t)), "txt.json": b"{}"}
        for row, t in zip(rows, types, strict=True)
    ]
    corpus = Corpus(write_tar(tmp_path / "a.tar", records), "webdataset")
    assert (corpus.kind, corpus.column) == ("tokens", "ids.npy")
    pass_over = reading(corpus)
    items = [item for items in pass_over for item in items]
    assert [np.frombuffer(item, "<i4").tolist() for item in items] == [rows[0], rows[2]]
    assert pass_over.skipped == {"empty": 1}


def test_webdataset_passes_over_what_is_no_record(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in [("a", tarfile.DIRTYPE), ("a/0.txt", tarfile.SYMTYPE)]:
            header = tarfile.TarInfo(name)
            header.type = kind
            tar.addfile(header)
        for name in ("README", "a/._1.txt", "a/1.txt", ".hidden"):
            header = tarfile.TarInfo(name)
            header.size = 1
            tar.addfile(header, io.BytesIO(b"x"))
    assert read(tmp_path / "a.tar", "webdataset") == ["x"]


@pytest.mark.parametrize(
    ("record", "there"),
    [
        ({"json": b"{}", "jpg": b""}, "there are: jpg, json"),
        ({"txt": "a", "ids.npy": npy([1])}, "there are: ids.npy, txt"),
    ],
)
def test_webdataset_members_to_choose_from_are_listed(tmp_path, record, there):
    with pytest.raises(UserError, match=there):
        Corpus(write_tar(tmp_path / "a.tar", [record]), "webdataset")


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("txt", b"\xff\xfe", "UTF-8"),
        ("txt", b"a\0", "binary"),
        ("npy", b"", "no .npy array"),
        ("npy", b"no array", "no .npy array"),
        ("npy", npy([1, 2])[:-3], "no .npy array"),
        ("npy", npy(np.array([{}], object)), "no .npy array"),
        ("npy", npy([[1]]), "2-D of int64"),
        ("npy", npy(1), "0-D"),
        ("npy", npy([1.0]), "float64"),
        ("npy", npy([True]), "bool"),
        ("npy", npy([4, -1]), "-1 to 4"),
        ("npy", npy([2**31]), "2147483648"),
    ],
)
def test_bad_records_are_named(tmp_path, member, content, message):
    path = write_tar(tmp_path / "a.tar", [{member: content}])
    with pytest.raises(UserError, match=message) as error:
        read(path, "webdataset", member)
    assert str(error.value).startswith(f"{path}, record '0000'")
    assert "\n" not in str(error.value)


def test_a_record_with_a_member_twice_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("1.txt"))
    with pytest.raises(UserError, match="'1': more than one member 'txt'"):
        read(tmp_path / "a.tar", "webdataset")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_tar_file_cut_anywhere_is_an_error(tmp_path, suffix):
    records = [{"txt": "text", "json": b"{}"}] * 3
    whole = write_tar(tmp_path / "whole", records).read_bytes()
    with tarfile.open(tmp_path / "whole") as tar:
        end = tar.getmembers()[-1].offset_data + 512
    path = tmp_path / f"a.tar{suffix}"
    for cut in [*range(0, end + 1, 512), *range(7, end, 311)]:
        content = whole[:cut]
        path.write_bytes(gzip.compress(content, 1) if suffix else content)
        with pytest.raises(UserError, match="no whole tar file") as error:
            read(path, "webdataset", "txt")
        assert str(path) in str(error.value)
    path.write_bytes(gzip.compress(whole)[:-9] if suffix else whole[: end + 512])
    if suffix:
        with pytest.raises(UserError, match=f"cannot read {path}"):
            read(path, "webdataset", "txt")
    else:
        assert read(path, "webdataset") == ["text"] * 3


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_tar_file_is_an_error_or_read(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    content = bytearray(write_tar(path, [{"ids.npy": npy([1, 2])}] * 2).read_bytes()[:5120])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 4096))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        assert len(read(path, "webdataset")) <= 2
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017 both outcomes are right
