import errno
import hashlib
import json
import os
import pickle
import shutil

import pytest
import torch

from t5vae.checkpoint import retention
from t5vae.checkpoint.manifest import (
    MANIFEST,
    check_identity,
    consolidated_weights,
    digest,
    read_manifest,
    seal,
    verify,
)
from t5vae.common.errors import StorageError, UserError

IDENTITY = {"optimizer": "muon", "global_batch_size": 16, "model": {"t5": {"d_model": 16}}}
RANKS = [f"rank-0000{rank}.safetensors" for rank in range(2)]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path, save):
    """A run's checkpoints of steps 10, 20 and 30, of two ranks."""
    folder = tmp_path / "checkpoints"
    for step in (10, 20, 30):
        save(folder, step, IDENTITY, world=2)
    return folder


def test_a_saved_checkpoint_is_whole_and_says_what_it_is(folder):
    saved = folder / "step-00000030"
    assert verify(saved) is None
    manifest = read_manifest(saved)
    assert manifest["step"] == 30
    assert manifest["world_size"] == 2
    assert manifest["data"] == {"consumed": 480}
    assert manifest["global_batch_size"] == 16
    assert names(saved) == [MANIFEST, *RANKS]
    assert sorted(manifest["files"]) == RANKS


def test_checkpoints_are_listed_oldest_first_and_nothing_else_is(folder, save):
    for other in ("step-00000040.tmp", "step-00000050.damaged-0", "notes", "step-", "step-x"):
        (folder / other).mkdir()
    for step in (100_000_000, 99_999_999):
        save(folder, step)
    found = [retention.step_of(path) for path in retention.list_checkpoints(folder)]
    assert found == [10, 20, 30, 99_999_999, 100_000_000]
    assert retention.list_checkpoints(folder / "none") == []


def test_the_newest_whole_checkpoint_is_taken_in_silence(folder):
    said = []
    assert retention.newest_valid(folder, said.append).name == "step-00000030"
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


@pytest.mark.parametrize("file", [*RANKS, MANIFEST])
@pytest.mark.parametrize("damage", [remove, truncate, lengthen, flip])
def test_a_damaged_file_is_named_set_aside_and_the_one_before_taken(folder, damage, file):
    damage(folder / "step-00000030" / file)
    said = []
    assert retention.newest_valid(folder, said.append) == folder / "step-00000020"
    assert len(said) == 1
    assert "step-00000030" in said[0]
    assert "step-00000030.damaged-0" in said[0]
    assert file in said[0]
    assert names(folder) == ["step-00000010", "step-00000020", "step-00000030.damaged-0"]


def test_a_flipped_bit_anywhere_in_a_ranks_file_is_seen(folder):
    path = folder / "step-00000030" / RANKS[1]
    whole = path.read_bytes()
    for at in range(0, len(whole), 61):
        content = bytearray(whole)
        content[at] ^= 1 << (at % 8)
        path.write_bytes(content)
        assert RANKS[1] in verify(path.parent), at
    path.write_bytes(whole)
    assert verify(path.parent) is None


def test_sizes_alone_are_compared_where_that_is_asked_for(folder):
    saved = folder / "step-00000030"
    flip(saved / RANKS[0])
    assert verify(saved, hashes=False) is None
    size = (saved / RANKS[1]).stat().st_size
    lengthen(saved / RANKS[1])
    told = f"{RANKS[1]} has {size + 1} bytes, not {size}"
    assert verify(saved, hashes=False) == told


def test_no_flipped_bit_of_a_manifest_changes_what_is_resumed(folder):
    path = folder / "step-00000030" / MANIFEST
    whole, manifest = path.read_bytes(), read_manifest(path.parent)
    for at in range(len(whole)):
        content = bytearray(whole)
        content[at] ^= 1 << (at % 7)
        path.write_bytes(content)
        if verify(path.parent) is None:
            assert read_manifest(path.parent) == manifest, chr(whole[at])


def test_a_manifest_that_was_edited_is_told(folder):
    path = folder / "step-00000030" / MANIFEST
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, "step": 31}))
    assert "it has changed" in verify(path.parent)


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
        b'{"step": 30, "files": {}}',
        b'{"step": 30, "files": {}, "seal": null}',
        b'{"step": 30, "files": {"rank-00000.safetensors": 7}, "seal": 3}',
        b"\xff\xfe\x00",
        b"\0" * 4096,
    ],
)
def test_garbage_in_a_manifests_place_is_no_checkpoint(folder, content):
    (folder / "step-00000030" / MANIFEST).write_bytes(content)
    assert MANIFEST in verify(folder / "step-00000030")
    assert retention.newest_manifest(folder)["step"] == 20
    assert retention.newest_valid(folder).name == "step-00000020"


def test_all_damaged_means_none_and_nothing_is_deleted(folder):
    for path in retention.list_checkpoints(folder):
        truncate(path / RANKS[0])
    said = []
    assert retention.newest_valid(folder, said.append) is None
    assert len(said) == 3
    assert names(folder) == [f"step-000000{n}0.damaged-0" for n in (1, 2, 3)]
    assert names(folder / "step-00000010.damaged-0") == [MANIFEST, *RANKS]


def test_what_is_set_aside_twice_overwrites_nothing(folder, save):
    for _ in range(2):
        truncate(folder / "step-00000030" / RANKS[0])
        retention.newest_valid(folder)
        save(folder, 30)
    assert names(folder)[-3:] == [
        "step-00000030",
        "step-00000030.damaged-0",
        "step-00000030.damaged-1",
    ]


WEATHER = [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT]
PLACES = [("list", "checkpoints"), ("open", MANIFEST), ("stat", RANKS[0]), ("open", RANKS[1])]
LOOKS = [
    retention.newest_valid,
    retention.newest_manifest,
    lambda folder: retention.describe(folder, hashes=True),
]


@pytest.mark.parametrize("number", WEATHER)
@pytest.mark.parametrize(("call", "ending"), PLACES)
def test_storage_that_fails_for_a_while_makes_no_checkpoint_another(
    folder, failing, call, ending, number
):
    wanted = [look(folder) for look in LOOKS]
    met = failing(call, ending, number, times=2)
    assert [look(folder) for look in LOOKS] == wanted
    assert len(met) == 2
    assert names(folder) == ["step-00000010", "step-00000020", "step-00000030"]


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EIO, StorageError), (errno.ESTALE, StorageError), (errno.EACCES, UserError)],
)
@pytest.mark.parametrize(("call", "ending"), PLACES)
def test_a_checkpoint_that_cannot_be_reached_is_neither_damaged_nor_none(
    folder, failing, monkeypatch, call, ending, number, kind
):
    failing(call, ending, number)
    for look in LOOKS if ending in ("checkpoints", MANIFEST) else LOOKS[::2]:
        with pytest.raises(kind, match=os.strerror(number)) as caught:
            look(folder)
        assert len(str(caught.value).splitlines()) == 1
    monkeypatch.undo()
    assert names(folder) == ["step-00000010", "step-00000020", "step-00000030"]


def test_a_file_in_a_checkpoints_place_and_a_folder_in_a_files_are_no_checkpoint(folder):
    (folder / "step-00000040").write_text("something")
    (folder / "step-00000030" / RANKS[0]).unlink()
    (folder / "step-00000030" / RANKS[0]).mkdir()
    assert retention.newest_valid(folder) == folder / "step-00000020"
    assert names(folder)[-2:] == ["step-00000030.damaged-0", "step-00000040.damaged-0"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EBUSY])
def test_a_damaged_one_that_cannot_be_set_aside_is_told(folder, failing, number):
    truncate(folder / "step-00000030" / RANKS[0])
    failing("rename", "step-00000030", number)
    with pytest.raises(UserError, match=r"step-00000030 is damaged .* cannot be set aside: "):
        retention.newest_valid(folder)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("done", [False, True])
def test_one_is_set_aside_once_the_storage_answers(folder, failing, number, done):
    truncate(folder / "step-00000030" / RANKS[0])
    failing("rename", "step-00000030", number, times=1, done=done)
    assert retention.newest_valid(folder) == folder / "step-00000020"
    assert names(folder) == ["step-00000010", "step-00000020", "step-00000030.damaged-0"]


def test_one_step_alone_is_looked_at_where_it_is_asked_for(folder):
    truncate(folder / "step-00000030" / RANKS[0])
    assert retention.newest_valid(folder, step=20).name == "step-00000020"
    assert retention.newest_valid(folder, step=40) is None
    assert names(folder) == ["step-00000010", "step-00000020", "step-00000030"]
    assert retention.newest_valid(folder, step=30) is None


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        ({"last": 1}, [30]),
        ({"last": 2}, [20, 30]),
        ({"last": 3}, [10, 20, 30]),
        ({"last": 9}, [10, 20, 30]),
        ({"last": 1, "every": 20}, [20, 30]),
        ({"last": 1, "every": 10}, [10, 20, 30]),
        ({"last": 1, "every": 7}, [30]),
    ],
)
def test_the_newest_and_each_so_many_steps_are_kept(folder, rules, left):
    (folder / "step-00000005.damaged-0").mkdir()
    retention.retain(folder, print, **rules)
    assert names(folder) == ["step-00000005.damaged-0", *(f"step-000000{n}" for n in left)]


@pytest.mark.parametrize(
    ("held_out", "left"),
    [
        ([2.0, 1.0, 3.0, 4.0], [20, 40]),
        ([1.0, 1.5, 3.0, 4.0], [10, 40]),
        ([3.0, 2.0, 1.5, 1.0], [40]),
        ([None, 2.0, None, None], [20, 40]),
        ([None, 2.0, None, 1.0], [40]),
        ([None, None, None, None], [40]),
        ([0.0, 2.0, 3.0, 4.0], [10, 40]),
    ],
)
def test_the_best_on_held_out_sequences_is_kept(tmp_path, save, held_out, left):
    for step, nats in zip((10, 20, 30, 40), held_out, strict=True):
        save(tmp_path / "run", step, held_out=nats)
    retention.retain(tmp_path / "run", print, last=1, best=True)
    assert names(tmp_path / "run") == [f"step-000000{n}" for n in left]


def test_the_best_goes_where_it_is_not_asked_for(tmp_path, save):
    for step in (10, 20):
        save(tmp_path / "run", step, held_out=float(step))
    retention.retain(tmp_path / "run", print, last=1, best=False)
    assert names(tmp_path / "run") == ["step-00000020"]


def test_a_manifest_that_cannot_be_read_is_not_the_best(tmp_path, save):
    for step in (10, 20, 30):
        save(tmp_path / "run", step, held_out=float(step))
    flip(tmp_path / "run/step-00000010" / MANIFEST)
    retention.retain(tmp_path / "run", print, last=1, best=True)
    assert names(tmp_path / "run") == ["step-00000020", "step-00000030"]


def test_a_deletion_that_is_cut_short_leaves_no_half_checkpoint(folder, monkeypatch):
    def killed(path, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            retention.retain(folder, print, last=2)
    found = retention.list_checkpoints(folder)
    assert [path.name for path in found] == ["step-00000020", "step-00000030"]
    assert all(verify(path) is None for path in found)
    retention.sweep(folder, print)
    assert names(folder) == ["step-00000020", "step-00000030"]


def test_what_a_crash_left_is_swept_and_nothing_else(folder):
    for left in ("step-00000040.tmp", "step-00000005.deleted"):
        (folder / left).mkdir()
        (folder / left / RANKS[0]).write_bytes(b"half of it")
    others = ["notes", "step-00000030.damaged-0"]
    for other in others:
        (folder / other).mkdir()
    retention.sweep(folder, print)
    assert names(folder) == sorted(["step-00000010", "step-00000020", "step-00000030", *others])


HOUSEKEEPING = [errno.ENOTEMPTY, errno.EBUSY, errno.EIO, errno.EACCES, errno.EROFS]


@pytest.mark.parametrize("number", HOUSEKEEPING)
@pytest.mark.parametrize(("call", "ending"), [("rmdir", ".deleted"), ("rename", "step-00000010")])
def test_what_cannot_be_deleted_is_told_and_deleted_another_time(
    folder, failing, call, ending, number
):
    said = []
    failing(call, ending, number, times=2)
    retention.retain(folder, said.append, last=2)
    (line,) = said
    assert "step-00000010 could not be deleted" in line
    assert os.strerror(number) in line
    assert all(verify(folder / f"step-000000{step}") is None for step in (20, 30))
    for _ in range(2):
        retention.sweep(folder, said.append)
        retention.retain(folder, said.append, last=2)
    assert len(said) == 2
    assert names(folder) == ["step-00000020", "step-00000030"]


def test_what_was_deleted_in_part_is_in_nobodys_way(folder, save, failing):
    said = []
    failing("rmdir", ".deleted", errno.ENOTEMPTY)
    for _ in range(3):
        retention.retain(folder, said.append, last=2)
        save(folder, 10)
    assert len(said) == 3
    assert [path.name for path in retention.list_checkpoints(folder)] == [
        "step-00000010",
        "step-00000020",
        "step-00000030",
    ]


@pytest.mark.parametrize("number", HOUSEKEEPING)
def test_what_a_crash_left_and_cannot_be_deleted_ends_no_start(folder, failing, number):
    for left in ("step-00000040.tmp", "step-00000005.deleted"):
        (folder / left).mkdir()
    said = []
    failing("rmdir", "", number, times=2)
    retention.sweep(folder, said.append)
    assert ["step-00000005.deleted" in said[0], "step-00000040.tmp" in said[1]] == [True, True]
    assert len(retention.list_checkpoints(folder)) == 3
    retention.sweep(folder, said.append)
    assert len(said) == 2
    assert names(folder) == ["step-00000010", "step-00000020", "step-00000030"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_while_checkpoints_cannot_be_listed_none_is_deleted(folder, failing, monkeypatch, number):
    said = []
    failing("list", "checkpoints", number)
    retention.retain(folder, said.append, last=1)
    assert said[0].startswith("no checkpoint is deleted: ")
    monkeypatch.undo()
    assert len(retention.list_checkpoints(folder)) == 3


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_one_that_may_be_the_best_is_kept(tmp_path, save, failing, monkeypatch, number):
    for step in (10, 20, 30):
        save(tmp_path / "run", step, held_out=float(step))
    failing("open", f"step-00000010/{MANIFEST}", number)
    retention.retain(tmp_path / "run", print, last=1, best=True)
    monkeypatch.undo()
    assert names(tmp_path / "run") == ["step-00000010", "step-00000020", "step-00000030"]


@pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.EACCES, errno.EIO])
@pytest.mark.parametrize(("call", "ending"), [("rmdir", ".deleted"), ("rename", "step-00000010")])
def test_a_user_is_told_what_cannot_be_deleted(folder, failing, call, ending, number):
    failing(call, ending, number)
    with pytest.raises(UserError, match=f"step-00000010: {os.strerror(number)}"):
        retention.remove(folder, "10")


def test_a_fingerprint_follows_the_content(tmp_path, save, make_engine):
    torch.manual_seed(0)
    first = digest(save(tmp_path / "a", 10))
    assert digest(save(tmp_path / "b", 10)) == first
    assert digest(save(tmp_path / "c", 10, engine=make_engine(seed=1))) != first
    assert digest(save(tmp_path / "d", 11)) != first


def test_an_equal_run_may_resume(folder):
    check_identity(retention.newest_manifest(folder), IDENTITY)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"optimizer": "adamw"}, ["optimizer", "muon", "adamw"]),
        ({"global_batch_size": 32}, ["global batch size", "16", "32"]),
        ({"seed": 7}, ["seed", "null", "7"]),
        ({"model": {"t5": {"d_model": 24}}}, ["model", "d_model", "16", "24"]),
        ({"model": {"t5": {}}}, ["model", "d_model", "16", "null"]),
    ],
)
def test_another_run_is_refused_with_what_differs_and_both_values(folder, changed, words):
    manifest = retention.newest_manifest(folder)
    with pytest.raises(UserError) as caught:
        check_identity(manifest, {**IDENTITY, **changed})
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert "step 30" in message
    for word in words:
        assert word in message


def test_a_difference_deep_in_a_long_value_is_still_shown():
    filler = {f"setting_{number:02}": "the same" for number in range(40)}
    manifest = {"step": 1, "model": {**filler, "zone": 111}}
    with pytest.raises(UserError) as caught:
        check_identity(manifest, {"model": {**filler, "zone": 222}})
    assert "111" in str(caught.value)
    assert "222" in str(caught.value)


@pytest.mark.parametrize("world", [1, 3])
def test_weights_are_put_together_from_all_ranks_in_fp32(tmp_path, save, make_engine, world):
    engine = make_engine()
    saved = save(tmp_path / "run", 10, engine=engine, world=world)
    weights = consolidated_weights(saved)
    wanted = dict(engine.module.named_parameters())
    assert weights.keys() == wanted.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        assert weight.equal(wanted[name].detach().flatten()), name


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("form", ["torch", "plain"])
def test_a_checkpoint_runs_no_code(tmp_path, save, form):
    saved = save(tmp_path / "run", 10)
    path = saved / RANKS[0]
    if form == "torch":
        torch.save({"module": Evil(tmp_path / "trace")}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(tmp_path / "trace")))
    manifest = read_manifest(saved)  # whoever made it knows how to seal it
    content = path.read_bytes()
    wanted = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    sealed = seal({**manifest, "files": {path.name: wanted}})
    (saved / MANIFEST).write_bytes(sealed)
    assert retention.newest_valid(saved.parent) == saved
    with pytest.raises(UserError, match="is damaged: it is no whole safetensors file"):
        consolidated_weights(saved)
    assert not (tmp_path / "trace").exists()
