"""A run's checkpoints while it trains; the ranks are threads of this process."""

import errno
import os
from contextlib import closing
from types import SimpleNamespace

import pytest

from t5vae.checkpoint import retention, saving
from t5vae.checkpoint.checkpoints import Checkpoints
from t5vae.checkpoint.manifest import read_manifest
from t5vae.cluster.scheduler import host_name
from t5vae.common.errors import StorageError, UserError
from t5vae.config import Checkpoint

OF_RUN = {"seed": 3, "layout": {"world_size": 1}, "weights_from": None}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Log:
    """What is told of saves."""

    def __init__(self, rank):
        self.enabled = rank == 0
        self.said, self.saves = [], []

    def say(self, text):
        self.said.append(text)

    def saved(self, text, **times):
        self.said.append(text)
        self.saves.append(times)


@pytest.fixture
def begin(tmp_path, together, make_engine):
    """Begins the checkpoints of a run of one rank, as the given settings say."""
    together(1)
    begun = []

    def make(**settings):
        checkpoints = Checkpoints(tmp_path, Checkpoint(**settings), OF_RUN, Log(0))
        begun.append(checkpoints)
        engine = make_engine()

        def save(step, held_out=None, *, last=False):
            state = {"data": {"consumed": step}, "watch": {}, "held_out": held_out}
            checkpoints.save(engine, step, state, last=last)

        return SimpleNamespace(save=save, folder=tmp_path, all=checkpoints, log=checkpoints.log)

    yield make
    for checkpoints in begun:
        checkpoints.close()


def test_a_manifest_says_what_the_run_and_what_the_step_is(begin):
    run = begin()
    run.save(10, 2.5)
    manifest = read_manifest(run.folder / "step-00000010")
    of_step = {"step": 10, "data": {"consumed": 10}, "watch": {}, "held_out": 2.5}
    assert {name: manifest[name] for name in OF_RUN | of_step} == OF_RUN | of_step


def test_a_save_is_told_with_its_size_and_times(begin):
    run = begin()
    run.save(10)
    (said,) = run.log.said
    size = (run.folder / "step-00000010/rank-00000.safetensors").stat().st_size
    assert said.startswith(f"saved {run.folder}/step-00000010 ({size / 1e6:,.1f} MB in ")
    (times,) = run.log.saves
    assert times["step"] == 10
    assert times["seconds"] >= times["stall"] > 0


def test_only_what_is_to_be_kept_stays(begin):
    run = begin(keep_last=1, keep_every=30, keep_best=True)
    for step, held_out in ((10, 3.0), (20, 1.0), (30, 2.0), (40, None), (50, 4.0)):
        run.save(step, held_out)
    assert names(run.folder) == [f"step-000000{step}" for step in (20, 30, 50)]


def test_an_asynchronous_save_is_committed_once_all_have_written(begin, held):
    run = begin(asynchronous=True)
    run.save(10)
    assert not run.all.written
    run.all.commit(False)
    assert names(run.folder) == ["step-00000010.tmp"]
    held.set()
    run.all.saver.pending.result(60)
    assert run.all.written
    assert run.log.said == []
    run.all.commit(True)
    assert names(run.folder) == ["step-00000010"]
    run.all.commit(True)  # nothing is left to commit
    assert len(run.log.saves) == 1


@pytest.mark.parametrize("last", [False, True])
def test_a_save_waits_for_the_one_before_and_the_last_for_itself(begin, last):
    run = begin(asynchronous=True)
    run.save(10)
    run.save(20, last=last)
    assert [times["step"] for times in run.log.saves] == ([10, 20] if last else [10])
    assert names(run.folder) == ["step-00000010", "step-00000020" + ("" if last else ".tmp")]


def test_a_save_that_fails_ends_the_run(begin, monkeypatch):
    monkeypatch.setattr(saving, "write", no_space)
    run = begin()
    with pytest.raises(UserError, match=r"step-00000010 could not be saved \(rank 0 on \S+: No "):
        run.save(10)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_folder_that_cannot_be_written_is_for_the_user_to_mend(begin, failing, number):
    run = begin()
    failing("open", "rank-00000.safetensors", number)
    with pytest.raises(UserError, match=f"{os.strerror(number)}.*: make {run.folder} writable"):
        run.save(10)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_storage_that_fails_ends_a_run_as_such_or_goes_on_if_that_is_asked_for(
    begin, failing, monkeypatch, number
):
    failing("open", "rank-00000.safetensors", number)
    with pytest.raises(StorageError, match="step-00000010 could not be saved") as caught:
        begin().save(10)
    assert len(str(caught.value).splitlines()) == 1
    run = begin(on_error="continue")
    run.save(20)
    assert run.log.said[0].startswith("step-00000020 could not be saved (rank 0 on ")
    assert run.log.said[0].endswith("; training goes on without it")
    with pytest.raises(StorageError):
        run.save(30, last=True)
    assert names(run.folder) == []


@pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.EBUSY, errno.EIO, errno.EACCES])
def test_an_old_checkpoint_that_cannot_be_deleted_ends_no_run(begin, failing, number):
    run = begin(keep_last=1)
    failing("rmdir", ".deleted", number)
    for step in (10, 20, 30):
        run.save(step)
    told = [line for line in run.log.said if not line.startswith("saved ")]
    assert ["step-00000010 could not" in told[0], "step-00000020 could not" in told[1]] == [1, 1]
    assert [times["step"] for times in run.log.saves] == [10, 20, 30]


def test_a_save_that_fails_ends_no_run_that_is_to_go_on_but_for_the_last(begin, monkeypatch):
    run = begin(on_error="continue")
    with monkeypatch.context() as patched:
        patched.setattr(saving, "write", no_space)
        run.save(10)
        assert run.log.said == [
            f"step-00000010 could not be saved (rank 0 on {host_name()}: No space left on device); "
            "training goes on without it"
        ]
        assert names(run.folder) == []
        with pytest.raises(UserError, match="step-00000020 could not be saved"):
            run.save(20, last=True)
    run.save(30)
    assert names(run.folder) == ["step-00000030"]


def test_an_earlier_save_that_fails_does_not_end_a_run_at_its_last_step(begin, monkeypatch):
    run = begin(on_error="continue", asynchronous=True)
    with monkeypatch.context() as patched:
        patched.setattr(saving, "write", no_space)
        run.save(10)
        run.all.saver.pending.exception(60)
    run.save(20, last=True)
    assert [times["step"] for times in run.log.saves] == [20]


def test_every_rank_saves_and_the_first_alone_deletes(tmp_path, together, make_engine):
    settings, logs = Checkpoint(keep_last=1), [Log(rank) for rank in range(2)]

    def save_rank(rank):
        with closing(Checkpoints(tmp_path, settings, OF_RUN, logs[rank])) as checkpoints:
            for step in (10, 20):
                state = {"data": {}, "watch": {}, "held_out": None}
                checkpoints.save(make_engine(), step, state, last=step == 20)

    for told in together(2).run(save_rank):
        told.result()
    assert names(tmp_path) == ["step-00000020"]
    assert [[times["step"] for times in log.saves] for log in logs] == [[10, 20]] * 2


def test_to_remove_a_checkpoint_the_newest_alone_is_hashed(tmp_path, save, monkeypatch):
    for step in (10, 20, 30):
        save(tmp_path, step)
    verified, verify = [], retention.verify
    monkeypatch.setattr(
        retention, "verify", lambda path: verified.append(path.name) or verify(path)
    )
    retention.remove(tmp_path, "10")
    assert verified == ["step-00000030"]
