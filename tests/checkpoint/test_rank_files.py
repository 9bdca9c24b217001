import errno
import hashlib
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from t5vae.checkpoint import rank_files
from t5vae.checkpoint.rank_files import Fragments, write
from t5vae.common.errors import StorageError, UserError

DTYPES = list(rank_files.NAMES)


def numbers(count, dtype=torch.float32):
    if dtype == torch.uint8:
        return torch.arange(count).to(dtype)
    return torch.linspace(-3, 3, count).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 1001])
def test_what_is_written_is_read_by_safetensors_itself(tmp_path, dtype, count):
    path = tmp_path / "file"
    write(path, {"some/name.weight/3": numbers(count, dtype)}, {})
    (found,) = load_file(path).values()
    assert found.dtype == dtype
    assert found.equal(numbers(count, dtype))


def test_mixed_dtypes_and_odd_sizes_are_aligned_to_their_elements(tmp_path):
    path = tmp_path / "file"
    tensors = {
        f"{count}/{dtype}": numbers(count, dtype)
        for count in (5, 1, 3)
        for dtype in reversed(DTYPES)
    }
    write(path, tensors, {"a": "b"})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(found[name].equal(tensor) for name, tensor in tensors.items())
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"a": "b"}
    for name, entry in header.items():
        assert entry["data_offsets"][0] % tensors[name].element_size() == 0, name


def test_shapes_views_and_parameters_are_written_as_they_look(tmp_path):
    path, matrix = tmp_path / "file", numbers(12).view(3, 4)
    tensors = {
        "matrix": matrix,
        "transposed": matrix.t(),
        "every other": numbers(9)[::2],
        "inside": numbers(9)[2:5],
        "parameter": nn.Parameter(matrix),
    }
    write(path, tensors, {})
    for name, found in load_file(path).items():
        assert found.equal(tensors[name].detach()), name


def test_metadata_are_read_back_whatever_they_say(tmp_path):
    metadata = {"random": json.dumps({"é": [1.5, None]}), "quote": '"\\\n\0é', "empty": ""}
    for tensors in ({}, {"a": numbers(3)}):
        write(tmp_path / "file", tensors, metadata)
        with safe_open(tmp_path / "file", framework="pt") as file:
            assert file.metadata() == metadata
            assert set(file.keys()) == set(tensors)


def test_not_finite_numbers_are_written_as_they_are(tmp_path):
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    write(tmp_path / "file", {"a": odd}, {})
    assert load_file(tmp_path / "file")["a"].view(torch.int32).equal(odd.view(torch.int32))


@pytest.mark.parametrize("count", [0, 1, 3, 70_001])
def test_size_and_hash_are_those_of_the_file(tmp_path, count):
    path = tmp_path / "file"
    told = write(path, {"a": numbers(count), "b": numbers(3, torch.uint8)}, {"é": "ü"})
    content = path.read_bytes()
    assert told == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_what_was_there_is_replaced_all_of_it(tmp_path):
    path = tmp_path / "file"
    write(path, {"a": numbers(1000)}, {})
    told = write(path, {"a": numbers(3)}, {})
    assert path.stat().st_size == told["bytes"]


def test_a_file_is_on_the_disk_when_it_is_said_to_be(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "os.fsync", lambda descriptor: sizes.append((tmp_path / "file").stat().st_size)
    )
    told = write(tmp_path / "file", {"a": numbers(1000)}, {})
    assert sizes == [told["bytes"]]


@pytest.mark.parametrize("count", [3, 1_000_000])
def test_a_full_disk_is_told(count):
    if not Path("/dev/full").exists():
        pytest.skip("the system has no /dev/full")
    with pytest.raises(OSError, match="No space"):
        write(Path("/dev/full"), {"a": numbers(count)}, {})


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "none" / "file", {"a": numbers(3)}, {})


# Ranges.


@st.composite
def splits(draw):
    """A parameter's size, where it is cut, to which file each piece goes, and a range."""
    size = draw(st.integers(1, 40))
    cuts = draw(st.sets(st.integers(1, size - 1), max_size=8)) if size > 1 else set()
    edges = [0, *sorted(cuts), size]
    files = [draw(st.integers(0, 3)) for _ in edges[1:]]
    start = draw(st.integers(0, size - 1))
    return size, edges, files, start, draw(st.integers(0, size - start))


def deal(folder, size, edges, files):
    """Write pieces of a parameter, and of another, in up to four files."""
    dealt = [{f"weight/other.{file}/0": torch.full((50,), -1.0)} for file in range(4)]
    whole = numbers(size, torch.float64)
    for begin, end, file in zip(edges, edges[1:], files, strict=False):
        if file is not None:
            dealt[file][f"weight/layers.0.w/{begin}"] = whole[begin:end]
    paths = [folder / f"{number}.safetensors" for number in range(4)]
    for path, tensors in zip(paths, dealt, strict=True):
        write(path, tensors, {})
    return Fragments(paths), whole


@settings(max_examples=60, deadline=None)
@given(splits())
def test_any_range_is_read_whatever_the_pieces(split):
    size, edges, files, start, length = split
    with tempfile.TemporaryDirectory() as folder:
        saved, whole = deal(Path(folder), size, edges, files)
        found = saved.read("weight", "layers.0.w", start, length)
        assert found.equal(whole[start : start + length])
        assert saved.length("weight", "layers.0.w") == size
        assert saved.dtype("weight", "layers.0.w") == torch.float64


@settings(max_examples=60, deadline=None)
@given(splits(), st.data())
def test_a_range_with_a_gap_is_refused_and_others_are_not(split, data):
    size, edges, files, start, length = split
    if len(files) == 1:
        return
    lost = data.draw(st.integers(0, len(files) - 1))
    begin, end = edges[lost], edges[lost + 1]
    files[lost] = None
    with tempfile.TemporaryDirectory() as folder:
        saved, whole = deal(Path(folder), size, edges, files)
        if max(start, begin) < min(start + length, end):
            with pytest.raises(ValueError, match=r"weight of layers\.0\.w: \d+ of \d+ elements"):
                saved.read("weight", "layers.0.w", start, length)
        else:
            found = saved.read("weight", "layers.0.w", start, length)
            assert found.equal(whole[start : start + length])


def test_a_range_beyond_the_end_is_refused(tmp_path):
    saved, _ = deal(tmp_path, 6, [0, 4, 6], [0, 1])
    with pytest.raises(ValueError, match="2 of 3 elements"):
        saved.read("weight", "layers.0.w", 4, 3)


def test_kinds_and_names_are_kept_apart(tmp_path):
    tensors = {
        "weight/a.b/0": numbers(3),
        "exp_avg/a.b/0": numbers(3) + 1,
        "weight/a/0": numbers(3) + 2,
        "weight/a.b.c/0": numbers(3) + 3,
        "weight/a/b/0": numbers(3) + 4,
    }
    write(tmp_path / "file", tensors, {})
    saved = Fragments([tmp_path / "file"])
    assert saved.kinds("a.b") == {"weight", "exp_avg"}
    assert saved.kinds("a") == {"weight"}
    for key, tensor in tensors.items():
        kind, name = key.removesuffix("/0").split("/", 1)
        assert saved.read(kind, name, 0, 3).equal(tensor)


def test_a_file_that_is_no_safetensors_file_is_not_opened(tmp_path):
    torch.save({"weight/a/0": numbers(3)}, tmp_path / "file")
    with pytest.raises(UserError, match="is damaged: it is no whole safetensors file"):
        Fragments([tmp_path / "file"])


def with_header(path, header, content=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def tensor(offsets, dtype="F32", shape=(3,)):
    return {"weight/a/0": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"3",
        b'{"weight/a/0": ',
        b"[" * 100_000,
        {"weight/a/0": 3},
        {"weight/a/x": tensor([0, 12])["weight/a/0"]},
        tensor([0, 12], dtype="F128"),
        tensor([0, 12], shape=(4,)),
        tensor([8, 20]),  # beyond the file's end
        tensor([-12, 0]),
        tensor([12, 0], shape=(-3,)),
        tensor([0]),
        tensor(None),
    ],
)
def test_a_header_that_names_what_the_file_does_not_hold_is_damage(tmp_path, header):
    with_header(tmp_path / "file", tensor([4, 16]))
    assert Fragments([tmp_path / "file"]).read("weight", "a", 0, 3).equal(torch.zeros(3))
    with_header(tmp_path / "file", header)
    with pytest.raises(UserError, match=f"{tmp_path}/file is damaged"):
        Fragments([tmp_path / "file"])


@pytest.mark.parametrize("length", [0, 1, 3, 100, 1 << 40, (1 << 64) - 1])
def test_a_header_is_no_longer_than_its_file(tmp_path, length):
    (tmp_path / "file").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="is damaged"):
        Fragments([tmp_path / "file"])


def test_a_file_that_became_shorter_is_damage_and_one_that_is_gone_is_told(tmp_path):
    saved, _ = deal(tmp_path, 6, [0, 4, 6], [0, 1])
    os.truncate(tmp_path / "1.safetensors", os.stat(tmp_path / "1.safetensors").st_size - 201)
    with pytest.raises(UserError, match=r"1\.safetensors is damaged"):
        saved.read("weight", "layers.0.w", 0, 6)
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot reach .*1\.safetensors: No such file"):
        saved.read("weight", "layers.0.w", 0, 6)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
@pytest.mark.parametrize("call", ["open", "stat"])
def test_a_file_is_opened_afresh_while_the_storage_fails(tmp_path, failing, call, number):
    deal(tmp_path, 6, [0, 4, 6], [0, 1])
    met = failing(call, "1.safetensors", number, times=2)
    saved = Fragments([tmp_path / f"{file}.safetensors" for file in range(4)])
    assert len(met) == 2
    failing("open", "0.safetensors", number, times=3)
    assert saved.read("weight", "layers.0.w", 0, 6).equal(numbers(6, torch.float64))


@pytest.mark.parametrize("times", [2, 10**9])
def test_storage_that_fails_in_a_read_ends_no_process_and_leaves_nothing_open(
    tmp_path, failing, monkeypatch, times
):
    saved, whole = deal(tmp_path, 6, [0, 4, 6], [0, 1])
    saved.files.close()
    before, preadv, met = os.listdir("/proc/self/fd"), os.preadv, []
    failing("open", "nothing", errno.EIO)  # makes patience short

    def fail(*args):
        if len(met) < times:
            met.append(args)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", fail)
    with saved:
        if times == 2:
            assert saved.read("weight", "layers.0.w", 0, 6).equal(whole)
        else:
            with pytest.raises(StorageError, match=r"0\.safetensors: the storage fails"):
                saved.read("weight", "layers.0.w", 0, 6)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("most", [1, 3, 7])
def test_reads_that_give_less_than_was_asked_for_go_on(tmp_path, monkeypatch, most):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: preadv(fd, [into[0][:most]], at))
    saved, whole = deal(tmp_path, 40, [0, 13, 40], [2, 0])
    assert saved.read("weight", "layers.0.w", 5, 30).equal(whole[5:35])


def test_a_file_that_may_not_be_read_is_told(tmp_path, failing):
    saved, _ = deal(tmp_path, 6, [0, 4, 6], [0, 1])
    saved.files.close()
    failing("open", "1.safetensors", errno.EACCES)
    with pytest.raises(UserError, match=r"cannot reach .*1\.safetensors: Permission denied"):
        saved.read("weight", "layers.0.w", 0, 6)
