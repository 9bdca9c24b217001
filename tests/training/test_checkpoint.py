import errno
import os
import pickle
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shards.errors import UserError
from t5vae.training import checkpoint

IDENTITY = {"zero_stage": 1, "global_batch_size": 16, "model": {"t5": {"d_model": 16}}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path, save):
    """A run's checkpoints of steps 10, 20 and 30."""
    folder = tmp_path / "checkpoints"
    for step in (10, 20, 30):
        save(folder, step, IDENTITY)
    return folder


def test_a_saved_checkpoint_is_whole_and_says_what_it_is(tmp_path, save):
    saved = save(tmp_path / "checkpoints", 1000, IDENTITY)
    assert saved.name == "step-00001000"
    assert checkpoint.verify(saved) is None
    manifest = checkpoint.read_manifest(saved)
    assert manifest["step"] == 1000
    assert manifest["data"] == {"consumed": 16000}
    assert manifest["world_size"] == 1
    assert manifest["global_batch_size"] == 16
    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == files - {checkpoint.MANIFEST}
    assert names(saved.parent) == ["step-00001000"]


def test_checkpoints_are_listed_oldest_first_and_nothing_else_is(folder, save):
    for other in ("step-00000040.tmp", "step-00000050.damaged-0", "notes", "step-", "step-x"):
        (folder / other).mkdir()
    save(folder, 100_000_000)
    found = [path.name for path in checkpoint.list_checkpoints(folder)]
    assert found == ["step-00000010", "step-00000020", "step-00000030", "step-100000000"]
    assert checkpoint.list_checkpoints(folder / "none") == []


def test_the_newest_whole_checkpoint_is_taken_in_silence(folder):
    said = []
    assert checkpoint.newest_valid(folder, said.append).name == "step-00000030"
    assert said == []


def remove(path):
    path.unlink()


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


FILES = [
    "deepspeed/weights.pt",
    "deepspeed/optimizer.pt",
    "rank-00000.json",
    "rank-00000.safetensors",
    checkpoint.MANIFEST,
]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [remove, truncate, lengthen, flip])
def test_a_damaged_file_is_named_set_aside_and_the_one_before_taken(folder, damage, file):
    damage(folder / "step-00000030" / file)
    said = []
    assert checkpoint.newest_valid(folder, said.append) == folder / "step-00000020"
    assert len(said) == 1
    assert "step-00000030" in said[0]
    assert file in said[0]
    assert names(folder) == ["step-00000010", "step-00000020", "step-00000030.damaged-0"]


def test_no_flipped_bit_of_a_manifest_changes_what_is_resumed(folder):
    path = folder / "step-00000030" / checkpoint.MANIFEST
    whole, manifest = path.read_bytes(), checkpoint.read_manifest(path.parent)
    for at in range(len(whole)):
        content = bytearray(whole)
        content[at] ^= 1 << (at % 7)
        path.write_bytes(content)
        if checkpoint.verify(path.parent) is None:
            assert checkpoint.read_manifest(path.parent) == manifest, chr(whole[at])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'"text"',
        b"3",
        b'{"step": 30',
        b'{"step": 30}',
        b'{"step": 30, "files": []}',
        b'{"step": 30, "files": {}}',
        b'{"step": 30, "files": null}',
        b'{"step": 30, "files": {"rank-00000.json": 7}}',
        b'{"step": 30, "files": {"rank-00000.json": {}}}',
        b"\xff\xfe\x00",
        b"\0" * 4096,
    ],
)
def test_garbage_in_a_manifests_place_is_no_checkpoint(folder, content):
    (folder / "step-00000030" / checkpoint.MANIFEST).write_bytes(content)
    assert checkpoint.MANIFEST in checkpoint.verify(folder / "step-00000030")
    assert checkpoint.newest_manifest(folder)["step"] == 20
    assert checkpoint.newest_valid(folder).name == "step-00000020"


def test_all_damaged_means_none_and_nothing_is_deleted(folder):
    for path in checkpoint.list_checkpoints(folder):
        truncate(path / "deepspeed/weights.pt")
    said = []
    assert checkpoint.newest_valid(folder, said.append) is None
    assert len(said) == 3
    assert names(folder) == [f"step-000000{n}0.damaged-0" for n in (1, 2, 3)]


def test_what_is_set_aside_twice_overwrites_nothing(folder, save):
    for _ in range(2):
        truncate(folder / "step-00000030" / "deepspeed/weights.pt")
        checkpoint.newest_valid(folder)
        save(folder, 30)
    assert names(folder)[-3:] == [
        "step-00000030",
        "step-00000030.damaged-0",
        "step-00000030.damaged-1",
    ]


def test_what_a_crash_left_of_a_save_is_replaced(folder, save):
    stale = folder / "step-00000040.tmp" / "deepspeed"
    stale.mkdir(parents=True)
    (stale / "half.pt").write_bytes(b"half")
    saved = save(folder, 40)
    assert checkpoint.verify(saved) is None
    assert not (saved / "deepspeed" / "half.pt").exists()
    assert names(folder)[-1] == "step-00000040"


def full_disk(tmp):
    tmp.mkdir()
    (tmp / "weights.pt").write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def torch_on_a_full_disk(tmp):
    raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


@pytest.mark.parametrize("write", [full_disk, torch_on_a_full_disk])
def test_a_failed_save_says_which_rank_and_why_and_leaves_the_others_valid(folder, save, write):
    with pytest.raises(OSError, match=r"rank 0.*(No space|failed writing)"):
        save(folder, 40, write=write)
    assert checkpoint.newest_valid(folder).name == "step-00000030"
    assert names(folder) == ["step-00000010", "step-00000020", "step-00000030"]


def test_a_manifest_that_cannot_be_written_leaves_no_checkpoint(folder, save, monkeypatch):
    def fail(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_write_durably", fail)
    with pytest.raises(OSError, match="No space"):
        save(folder, 40)
    assert names(folder) == ["step-00000010", "step-00000020", "step-00000030"]


@pytest.mark.parametrize(("keep", "left"), [(1, [30]), (2, [20, 30]), (3, [10, 20, 30])])
def test_the_newest_checkpoints_are_kept(folder, keep, left):
    (folder / "step-00000005.damaged-0").mkdir()
    checkpoint.retain(folder, keep)
    assert names(folder) == ["step-00000005.damaged-0", *(f"step-000000{n}" for n in left)]


def test_a_deletion_that_is_cut_short_leaves_no_half_checkpoint(folder, monkeypatch):
    def killed(path, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.retain(folder, 2)
    found = checkpoint.list_checkpoints(folder)
    assert [path.name for path in found] == ["step-00000020", "step-00000030"]
    assert all(checkpoint.verify(path) is None for path in found)


def test_a_fingerprint_follows_the_content(tmp_path, save):
    def other(folder):
        folder.mkdir()
        (folder / "weights.pt").write_bytes(b"other weights")

    torch.manual_seed(0)
    first = checkpoint.digest(save(tmp_path / "a", 10))
    torch.manual_seed(0)
    assert checkpoint.digest(save(tmp_path / "b", 10)) == first
    assert checkpoint.digest(save(tmp_path / "c", 10, write=other)) != first


def test_an_equal_run_may_resume(folder):
    checkpoint.check_identity(checkpoint.newest_manifest(folder), IDENTITY)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"zero_stage": 2}, ["zero stage", "1", "2"]),
        ({"global_batch_size": 32}, ["global batch size", "16", "32"]),
        ({"seed": 7}, ["seed", "null", "7"]),
        ({"model": {"t5": {"d_model": 24}}}, ["model", "d_model", "16", "24"]),
    ],
)
def test_another_run_is_refused_with_what_differs_and_both_values(folder, changed, words):
    manifest = checkpoint.newest_manifest(folder)
    with pytest.raises(UserError) as caught:
        checkpoint.check_identity(manifest, {**IDENTITY, **changed})
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert "step 30" in message
    for word in words:
        assert word in message


def test_a_difference_deep_in_a_long_value_is_still_shown(folder):
    filler = {f"setting_{number:02}": "the same" for number in range(40)}
    manifest = {"step": 1, "model": {**filler, "zone": 111}}
    with pytest.raises(UserError) as caught:
        checkpoint.check_identity(manifest, {"model": {**filler, "zone": 222}})
    assert "111" in str(caught.value)
    assert "222" in str(caught.value)


def draws():
    return random.random(), np.random.rand(), torch.rand(3).tolist(), np.random.randn()


@pytest.fixture
def _own_generators():
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


@pytest.mark.usefixtures("_own_generators")
def test_random_state_goes_on_where_it_was_saved(tmp_path, save):
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    random.gauss(0, 1)  # leaves half a pair behind
    np.random.randn()
    saved = save(tmp_path / "checkpoints", 10)
    expected = draws()
    assert draws() != expected
    checkpoint.load(saved, SimpleNamespace(load_checkpoint=lambda path, tag: None))
    assert draws() == expected


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def test_a_checkpoint_runs_no_code(tmp_path, save):
    def poisoned(folder):
        folder.mkdir()
        torch.save({"module": Evil(tmp_path / "trace")}, folder / "mp_rank_00_model_states.pt")

    saved = save(tmp_path / "checkpoints", 10, {"zero_stage": 0}, poisoned)
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.consolidated_weights(saved)

    def load_as_deepspeed_does(path, tag):
        torch.load(f"{path}/{tag}/mp_rank_00_model_states.pt", weights_only=False)

    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(saved, SimpleNamespace(load_checkpoint=load_as_deepspeed_does))
    assert not (tmp_path / "trace").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_weights_without_zero_are_read_as_fp32(tmp_path, save):
    def plain(folder):
        folder.mkdir()
        weights = {"a.weight": torch.ones(2, 3, dtype=torch.bfloat16)}
        torch.save({"module": weights}, folder / "mp_rank_00_model_states.pt")

    saved = save(tmp_path / "checkpoints", 10, {"zero_stage": 0}, plain)
    weights = checkpoint.consolidated_weights(saved)
    assert weights["a.weight"].dtype == torch.float32
    assert weights["a.weight"].sum() == 6
