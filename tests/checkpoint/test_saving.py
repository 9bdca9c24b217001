import errno
import json
import os
import random
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from t5vae.checkpoint import retention, saving
from t5vae.checkpoint.manifest import (
    FORMAT,
    consolidated_weights,
    open_fragments,
    read_manifest,
    verify,
)
from t5vae.checkpoint.randomness import set_random_state
from t5vae.checkpoint.rank_files import write
from t5vae.cluster.scheduler import host_name
from t5vae.common.errors import StorageError

RANK_1 = "rank-00001.safetensors"
FULL = r"rank 0 on \S+: No space left on device$"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def folder(tmp_path, save):
    """A run's checkpoint of step 30, by three ranks."""
    save(tmp_path / "checkpoints", 30, world=3)
    return tmp_path / "checkpoints"


@pytest.fixture
def make_saver(tmp_path, together):
    """Makes a saver of a run by one rank."""
    made = []

    def make(**options):
        together(1)
        made.append(saving.Saver(tmp_path / "checkpoints", **options))
        return made[-1]

    yield make
    for saver in made:
        saver.close()


def test_a_manifest_says_what_was_saved_and_by_how_many(tmp_path, save):
    saved = save(tmp_path / "checkpoints", 1000, {"seed": 3}, world=3, held_out=2.5)
    assert saved == tmp_path / "checkpoints/step-00001000"
    manifest = read_manifest(saved)
    assert manifest["step"] == 1000
    assert manifest["world_size"] == 3
    assert manifest["scalars"] == {"step": 1.0, "loss_scale": {}}
    assert manifest["seed"] == 3
    assert manifest["held_out"] == 2.5
    assert names(saved) == ["manifest.json", *(f"rank-0000{rank}.safetensors" for rank in range(3))]
    assert {name: of["bytes"] for name, of in manifest["files"].items()} == {
        path.name: path.stat().st_size for path in saved.glob("rank-*")
    }
    assert verify(saved) is None


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("world", [1, 3, 40])
def test_a_manifest_says_where_everything_is_unless_ranks_differ_in_that(
    tmp_path, save, make_engine, monkeypatch, optimizer, world
):
    engine = make_engine(optimizer)
    identity = {"format": FORMAT, "model": {}}
    told = save(tmp_path / "told", 10, identity, engine, world=world)
    real = saving.ranges
    monkeypatch.setattr(saving, "ranges", lambda engine: real(engine)[saving.dist.get_rank() % 2 :])
    untold = save(tmp_path / "untold", 10, identity, engine, world=world)
    assert ("ranges" in read_manifest(untold)) == (world == 1)
    with open_fragments(told) as placed:
        assert placed.places
        headers = [placed.header(path).pieces for path in placed.paths]
        everything = {key for pieces in headers for key in pieces if key[0] != "random"}
        assert set(placed.contents()) == everything
        for kind, name in everything:
            length = placed.length(kind, name)
            held = sum(len(pieces.get((kind, name), [])) for pieces in headers)
            assert held == len(placed.places[kind, name].place.ranks(0, length))
            placed.read(kind, name, 0, length)
    weights = dict(engine.module.named_parameters())
    for checkpoint in (told, untold):
        for name, weight in consolidated_weights(checkpoint).items():
            assert weight.equal(weights[name].detach().view(-1))


def test_every_rank_is_told_what_was_saved(tmp_path, together, make_engine):
    def save_rank(rank):
        with closing(saving.Saver(tmp_path, asynchronous=False)) as saver:
            saver.start(make_engine(), 10, {})
            return saver.finish()

    everyone = [told.result() for told in together(3).run(save_rank)]
    for saved in everyone:
        assert saved.path == tmp_path / "step-00000010"
        assert saved.bytes == sum(path.stat().st_size for path in saved.path.glob("rank-*"))


def test_seconds_are_those_of_the_save_and_stall_those_of_training(
    make_saver, make_engine, monkeypatch
):
    clock = iter([100.0, 101.5, 110.0, 112.0])  # start and its end, finish and its end
    monkeypatch.setattr(saving, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    saver = make_saver(asynchronous=True)
    saver.start(make_engine(), 10, {})
    saved = saver.finish()
    assert saved.seconds == 12.0
    assert saved.stall == 3.5


def test_an_asynchronous_save_is_that_of_the_moment_it_started(make_saver, make_engine, held):
    engine, saver = make_engine(), make_saver(asynchronous=True)
    wanted = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    moments = {
        name: engine.optimizer.state[p]["exp_avg"].clone()
        for name, p in engine.module.named_parameters()
    }
    saver.start(engine, 10, {"data": {"consumed": 160}})
    with torch.no_grad():  # training goes on
        for parameter in engine.module.parameters():
            parameter.zero_()
            for moment in engine.optimizer.state[parameter].values():
                moment.zero_()
    held.set()
    saved = saver.finish().path
    assert read_manifest(saved)["scalars"]["step"] == 1.0
    for name, weight in consolidated_weights(saved).items():
        assert weight.equal(wanted[name].flatten()), name
    fragments = open_fragments(saved)
    for name, moment in moments.items():
        assert fragments.read("exp_avg", name, 0, moment.numel()).equal(moment.flatten()), name


def test_the_generators_are_saved_as_they_were_at_the_start(make_saver, make_engine, held):
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.gauss(0, 1)  # leaves half a pair behind
        np.random.randn()
        saver = make_saver(asynchronous=True)
        saver.start(make_engine(), 10, {})
        draws = [random.gauss(0, 1), random.random(), np.random.randn(), torch.rand(3).tolist()]
        held.set()
        path = saver.finish().path / "rank-00000.safetensors"
        with safe_open(path, framework="pt") as file:
            tensors = {"cpu": file.get_tensor("random/cpu/0")}
            set_random_state(tensors, file.metadata()["random"])
        again = [random.gauss(0, 1), random.random(), np.random.randn(), torch.rand(3).tolist()]
        assert again == draws
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def test_a_save_is_written_when_its_file_is_and_no_checkpoint_before_it_is_finished(
    make_saver, make_engine, held
):
    saver = make_saver(asynchronous=True)
    assert not saver.written
    saver.start(make_engine(), 10, {})
    assert not saver.written
    held.set()
    saver.pending.result(60)
    assert saver.written
    assert names(saver.folder) == ["step-00000010.tmp"]
    assert retention.list_checkpoints(saver.folder) == []
    saver.finish()
    assert not saver.written
    assert saver.pending is None
    assert names(saver.folder) == ["step-00000010"]


def test_a_file_that_failed_is_not_waited_for(make_saver, make_engine, monkeypatch):
    monkeypatch.setattr(saving, "write", no_space)
    saver = make_saver(asynchronous=True)
    saver.start(make_engine(), 10, {})
    saver.pending.exception(60)
    assert saver.written
    with pytest.raises(OSError, match=r"rank 0 on \S+: No space"):
        saver.finish()
    assert saver.pending is None


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_whose_disk_is_full_is_named_on_all_ranks_and_nothing_is_left(
    folder, together, make_engine, monkeypatch, asynchronous
):
    def write_or_fail(path, tensors, metadata):
        if path.name != RANK_1:
            return write(path, tensors, metadata)
        path.write_bytes(b"half of it")
        return no_space()

    monkeypatch.setattr(saving, "write", write_or_fail)

    def save_rank(rank):
        with closing(saving.Saver(folder, asynchronous=asynchronous)) as saver:
            saver.start(make_engine(), 40, {})
            return saver.finish()

    for told in together(3).run(save_rank):
        assert isinstance(told.exception(), OSError)
        assert told.exception().strerror == f"rank 1 on {host_name()}: No space left on device"
    assert names(folder) == ["step-00000030"]
    assert verify(folder / "step-00000030") is None


def test_after_a_save_that_failed_the_next_one_is_whole(make_saver, make_engine, monkeypatch, save):
    saver = make_saver(asynchronous=False)
    with monkeypatch.context() as patched:
        patched.setattr(saving, "write", no_space)
        saver.start(make_engine(), 40, {})
        with pytest.raises(OSError, match=FULL):
            saver.finish()
    saver.start(make_engine(), 50, {})
    assert verify(saver.finish().path) is None
    assert names(saver.folder) == ["step-00000050"]


@pytest.mark.parametrize("part", ["_write_manifest", "fsync"])
def test_what_fails_while_it_is_committed_leaves_no_checkpoint(folder, save, monkeypatch, part):
    monkeypatch.setattr(saving, part, no_space)
    with pytest.raises(OSError, match=FULL):
        save(folder, 40, world=3)
    assert names(folder) == ["step-00000030"]


def test_a_folder_that_cannot_be_made_is_told_by_the_first_rank(folder, save, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", no_space)
    with pytest.raises(OSError, match=FULL):
        save(folder, 40, world=3)
    assert names(folder) == ["step-00000030"]


def test_a_file_in_the_folders_place_is_told_and_left(tmp_path, save):
    (tmp_path / "checkpoints").write_text("something")
    with pytest.raises(OSError, match="rank 0 on "):
        save(tmp_path / "checkpoints", 10)
    assert (tmp_path / "checkpoints").read_text() == "something"


WEATHER = [errno.EIO, errno.ESTALE, errno.ENOTCONN]


@pytest.mark.parametrize("number", WEATHER)
@pytest.mark.parametrize(
    ("call", "ending"),
    [
        ("mkdir", "step-00000040.tmp"),
        ("open", RANK_1),
        ("open", "manifest.json"),
        ("open", "step-00000040.tmp"),
        ("rename", "step-00000040.tmp"),
        ("open", "checkpoints"),
    ],
)
def test_a_save_goes_on_once_the_storage_answers(folder, save, failing, call, ending, number):
    met = failing(call, ending, number, times=2)
    assert verify(save(folder, 40, world=3)) is None
    assert len(met) == 2
    assert names(folder) == ["step-00000030", "step-00000040"]


@pytest.mark.parametrize("call", ["mkdir", "rename"])
def test_what_is_said_to_have_failed_and_was_done_is_done(folder, save, failing, call):
    failing(call, "step-00000040.tmp", errno.EIO, times=1, done=True)
    assert verify(save(folder, 40, world=3)) is None
    assert names(folder) == ["step-00000030", "step-00000040"]


def test_a_sync_that_failed_is_followed_by_all_of_the_file_again(
    folder, save, failing, monkeypatch
):
    fsync, lost = os.fsync, []
    failing("open", "nothing", errno.EIO)  # makes patience short

    def lose(descriptor):
        if len(lost) < 2:
            lost.append(os.fstat(descriptor).st_size)
            os.ftruncate(descriptor, 0)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", lose)
    saved = save(folder, 40)
    assert verify(saved) is None
    assert lost == [(saved / "rank-00000.safetensors").stat().st_size] * 2


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EIO, StorageError),
        (errno.ESTALE, StorageError),
        (errno.EACCES, PermissionError),
        (errno.EROFS, OSError),
    ],
)
@pytest.mark.parametrize(
    ("call", "ending"),
    [
        ("mkdir", "step-00000040.tmp"),
        ("open", RANK_1),
        ("open", "manifest.json"),
        ("rename", "step-00000040.tmp"),
    ],
)
def test_a_save_that_fails_on_one_rank_fails_alike_on_all(
    folder, together, make_engine, failing, monkeypatch, call, ending, number, kind
):
    failing(call, ending, number)

    def save_rank(rank):
        with closing(saving.Saver(folder, asynchronous=False)) as saver:
            saver.start(make_engine(), 40, {})
            return saver.finish()

    errors = [told.exception() for told in together(3).run(save_rank)]
    assert [type(error) for error in errors] == [type(errors[0])] * 3
    assert isinstance(errors[0], kind)
    (text,) = {str(error) for error in errors}
    assert f"rank {int(ending == RANK_1)} on " in text
    assert os.strerror(number) in text
    monkeypatch.undo()
    assert names(folder) == ["step-00000030"]
    assert verify(folder / "step-00000030") is None


@pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.EBUSY, errno.EACCES])
def test_what_a_crash_left_and_cannot_be_deleted_is_no_part_of_the_next_save(
    folder, save, failing, number
):
    stale = folder / "step-00000040.tmp"
    stale.mkdir()
    (stale / "rank-00007.safetensors").write_bytes(b"of another layout")
    failing("rmdir", "", number)
    saved = save(folder, 40)
    assert names(saved) == ["manifest.json", "rank-00000.safetensors"]
    assert verify(saved) is None
    assert [path.name for path in retention.list_checkpoints(folder)] == [
        "step-00000030",
        "step-00000040",
    ]


def test_what_a_crash_left_of_a_save_is_replaced(folder, save):
    stale = folder / "step-00000040.tmp"
    stale.mkdir()
    (stale / "rank-00007.safetensors").write_bytes(b"half")
    saved = save(folder, 40)
    assert names(saved) == ["manifest.json", "rank-00000.safetensors"]
    assert names(folder) == ["step-00000030", "step-00000040"]


def test_a_step_that_is_saved_again_overwrites_nothing(folder, save):
    content = (folder / "step-00000030/manifest.json").read_bytes()
    assert verify(save(folder, 30)) is None
    assert names(folder) == ["step-00000030", "step-00000030.damaged-0"]
    assert (folder / "step-00000030.damaged-0/manifest.json").read_bytes() == content


def test_a_crash_before_the_folder_has_its_name_leaves_no_checkpoint(folder, save, monkeypatch):
    def killed(path, target):
        assert (path / "manifest.json").is_file()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            save(folder, 40)
    assert [path.name for path in retention.list_checkpoints(folder)] == ["step-00000030"]
    retention.sweep(folder, print)
    assert names(folder) == ["step-00000030"]


def test_everything_is_on_the_disk_before_the_folder_has_its_name(tmp_path, save, monkeypatch):
    events, rename = [], Path.rename

    def sync(descriptor):
        events.append(os.fstat(descriptor).st_ino)

    def renamed(path, target):
        events.append("renamed")
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", sync)
        patched.setattr(Path, "rename", renamed)
        saved = save(tmp_path / "checkpoints", 10)
    named = {path.stat().st_ino: path.name for path in (saved, saved.parent, *saved.iterdir())}
    assert [named.get(event, event) for event in events] == [
        "rank-00000.safetensors",
        "manifest.json",
        "step-00000010",
        "renamed",
        "checkpoints",
    ]


def test_ranks_write_only_when_the_first_has_made_the_folder(
    tmp_path, together, make_engine, monkeypatch
):
    mkdir = Path.mkdir

    def slowly(path, *args, **kwargs):
        time.sleep(0.2)
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", slowly)

    def save_rank(rank):
        with closing(saving.Saver(tmp_path / "checkpoints", asynchronous=False)) as saver:
            saver.start(make_engine(), 10, {})
            return saver.finish().path

    for told in together(2).run(save_rank):
        assert verify(told.result()) is None


def test_a_manifest_is_json_for_everyone(tmp_path, save):
    saved = save(tmp_path / "checkpoints", 10, {"model": {"t5": {"é": [1, None, 0.5]}}})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    tree = json.loads((saved / "manifest.json").read_text(), parse_constant=refuse)
    assert tree["model"] == {"t5": {"é": [1, None, 0.5]}}
