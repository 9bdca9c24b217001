"""Datasets on storage that fails for a while, for ever, or that may not be read."""

import builtins
import errno
import gc
import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain, islice, repeat
from threading import Event
from weakref import WeakSet

import pytest

import shards
from shards import ShardStream
from shards.storage.store import UnreadableError
from t5vae.common.errors import DamageError, StorageError, UserError

SHARD = "train-00001.tar"
BRIEF = 0.2  # seconds of patience, where storage fails for ever
WEATHER = [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ESHUTDOWN]


class Opened(io.FileIO):
    """A file as `LocalStore` keeps it open."""


class Faults:
    """Opens and reads of files that fail, below the code.

    Attributes:
        met: whether any failed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.met = Event()
        self._numbers: dict[str, Iterator[int]] = {}
        self._open, self._pread = builtins.open, os.pread
        self._kept: WeakSet[Opened] = WeakSet()
        self._stale: WeakSet[Opened] = WeakSet()
        for module in (builtins, io):
            monkeypatch.setattr(module, "open", self._opened)
        monkeypatch.setattr("shards.storage.local.FileIO", self._kept_open)
        monkeypatch.setattr(os, "pread", self._read)

    def strike(self, name: str, numbers: Iterable[int]) -> None:
        """What fails the opens and reads of files whose paths hold that, in order; 0 is nothing."""
        self._numbers[name] = iter(numbers)

    def clear(self) -> None:
        """Let all go well from now on."""
        self._numbers.clear()

    def make_stale(self) -> None:
        """Let those that are open fail for ever."""
        self._stale = WeakSet(self._kept)

    def _opened(self, path, *args, **kwargs):
        self._fail(path)
        return self._open(path, *args, **kwargs)

    def _kept_open(self, path):
        self._fail(path)
        file = Opened(path)
        self._kept.add(file)
        return file

    def _read(self, number, size, offset):
        self._fail(os.readlink(f"/proc/self/fd/{number}"))
        if any(file.fileno() == number for file in self._stale):
            self.met.set()
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return self._pread(number, size, offset)

    def _fail(self, path) -> None:
        for name, numbers in self._numbers.items():
            if name in str(path) and (number := next(numbers, 0)):
                self.met.set()
                raise OSError(number, os.strerror(number), str(path))


@pytest.fixture
def faults(monkeypatch) -> Faults:
    monkeypatch.setattr("t5vae.common.storage.SHORTEST", 0.01)
    monkeypatch.setattr("t5vae.common.storage._patience", 30)
    return Faults(monkeypatch)


@pytest.fixture
def impatient(faults, monkeypatch) -> None:
    monkeypatch.setattr("t5vae.common.storage._patience", BRIEF)


def epoch(path, **options) -> tuple[list[list[int]], int]:
    """The ids of all sequences in the stream's order, and how many were quarantined."""
    n = shards.open_index(path).sequences("train")
    with ShardStream(path, seed=0, global_batch_size=n, **options) as stream:
        batch = next(stream)
        assert int((batch.weights == 0).sum()) == stream.quarantined
        return batch.ids.tolist(), stream.quarantined


@pytest.mark.parametrize("on_corrupt", ["error", "skip"])
@pytest.mark.parametrize("numbers", [[errno.EIO], [errno.ESTALE] * 2, WEATHER], ids=len)
@pytest.mark.parametrize("name", [SHARD, "index.json", "blocks.npy", ".tar"])
def test_what_fails_for_a_while_is_read_again(dataset, faults, name, numbers, on_corrupt):
    whole = epoch(dataset)
    faults.strike(name, numbers)
    assert epoch(dataset, on_corrupt=on_corrupt) == whole
    assert faults.met.is_set()


def test_stale_descriptors_are_not_kept(dataset, faults):
    n = shards.open_index(dataset).sequences("train")
    options = {"seed": 0, "global_batch_size": n // 2}
    with ShardStream(dataset, **options) as stream:
        whole = [batch.ids.tolist() for batch in islice(stream, 6)]
    with ShardStream(dataset, **options, on_corrupt="skip") as stream:
        seen = [next(stream).ids.tolist()]
        faults.make_stale()
        seen += [batch.ids.tolist() for batch in islice(stream, 5)]
        assert stream.quarantined == 0
    assert faults.met.is_set()
    assert seen == whole


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("on_corrupt", ["error", "skip"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
@pytest.mark.parametrize(
    ("name", "told"),
    [(SHARD, rf"{SHARD}, block \d+"), ("index.json", "index.json"), ("blocks.npy", "blocks.npy")],
)
def test_what_fails_for_ever_is_no_damage(dataset, faults, name, told, number, on_corrupt):
    faults.strike(name, repeat(number))
    with pytest.raises(StorageError) as caught:
        epoch(dataset, on_corrupt=on_corrupt)
    assert not isinstance(caught.value, UserError)
    line = rf"{re.escape(str(dataset))}/{told}: the storage fails \({os.strerror(number)}\), .*"
    assert re.fullmatch(line, str(caught.value))


@pytest.mark.parametrize("on_corrupt", ["error", "skip"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EMFILE, errno.EISDIR])
@pytest.mark.parametrize("name", [SHARD, "index.json", "blocks.npy"])
def test_what_may_not_be_read_is_the_users_to_mend(dataset, faults, name, number, on_corrupt):
    faults.strike(name, repeat(number))
    with pytest.raises(UserError) as caught:
        epoch(dataset, on_corrupt=on_corrupt)
    assert not isinstance(caught.value, DamageError)
    line = str(caught.value)
    assert re.match(rf"cannot read {re.escape(str(dataset))}/{name}.*: {os.strerror(number)}", line)
    assert ("permissions" in line) is (number in (errno.EACCES, errno.EPERM))
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize("on_corrupt", ["error", "skip"])
def test_a_missing_shard_is_no_damage_while_it_cannot_be_told_whether_it_was_replaced(
    dataset, tmp_path, faults, monkeypatch, on_corrupt
):
    copy = tmp_path / "copy"
    copy.symlink_to(dataset)
    index = shards.open_index(copy)
    assert len(index.blocks)
    faults.strike("index.json", repeat(errno.EIO))
    faults.strike(SHARD, repeat(errno.ENOENT))
    monkeypatch.setattr("t5vae.common.storage._patience", BRIEF)
    options = {"seed": 0, "global_batch_size": index.sequences("train")}
    opened = shards.Dataset((index,), (1,))
    with ShardStream(opened, **options, on_corrupt=on_corrupt) as stream:
        with pytest.raises(StorageError, match="the storage fails"):
            next(stream)
        faults.clear()
        faults.strike(SHARD, repeat(errno.ENOENT))
        if on_corrupt == "error":
            with pytest.raises(DamageError, match=rf"{SHARD}, block \d+: No such file"):
                next(stream)
        else:
            assert 0 < (next(stream).weights == 0).sum() == stream.quarantined


FILES = [SHARD, "index.json", "blocks.npy", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("numbers", [[errno.EIO], [0, errno.ESTALE], [0, 0, errno.EIO]], ids=str)
def test_verify_reads_again_what_fails_for_a_while(dataset, faults, name, numbers):
    faults.strike(name, numbers)
    assert shards.verify(dataset).problems == []


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", FILES)
def test_verify_tells_weather_and_damage_apart(dataset, faults, t5vae, name):
    faults.strike(name, repeat(errno.EIO))
    code, out, err = t5vae("shards", "verify", dataset)
    error = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out) == (1, "")
    assert re.fullmatch(rf"error: {dataset}/.*: the storage fails \(.*\), tried for .*", error[0])
    faults.strike(name, repeat(errno.EACCES))
    code, out, err = t5vae("shards", "verify", dataset)
    assert (code, out) == (2, "")
    assert "Permission denied: see to its permissions" in err
    faults.strike(name, repeat(errno.ENOENT))
    code, out, err = t5vae("shards", "verify", dataset)
    assert code == (2 if name == "index.json" else 1)
    assert "storage" not in out + err


@pytest.mark.usefixtures("impatient")
def test_debug_shows_where_the_storage_failed(dataset, faults, t5vae):
    faults.strike("blocks.npy", repeat(errno.EIO))
    code, _, err = t5vae("shards", "inspect", dataset, "--debug")
    assert code == 1
    assert "Traceback" in err
    assert f"StorageError: {dataset}/blocks.npy: the storage fails" in err


def test_a_tokenizer_that_cannot_be_read_is_no_wrong_tokenizer(dataset, faults, monkeypatch):
    folder = dataset / "tokenizer"
    whole = shards.load_tokenizer(folder).get_vocab()
    for numbers in ([errno.EIO] * 2, [0, errno.ESTALE], [0, errno.ESTALE, errno.EIO]):
        faults.strike("tokenizer_config.json", numbers)
        assert shards.load_tokenizer(folder).get_vocab() == whole
    faults.strike("tokenizer_config.json", repeat(errno.EACCES))
    with pytest.raises(UnreadableError, match=f"cannot read {folder}: Permission denied"):
        shards.load_tokenizer(folder)
    monkeypatch.setattr("t5vae.common.storage._patience", BRIEF)
    faults.strike("tokenizer_config.json", repeat(errno.EIO))
    with pytest.raises(StorageError, match=f"{folder}: the storage fails"):
        shards.load_tokenizer(folder)


@pytest.mark.parametrize("readers", [1, 16])
@pytest.mark.parametrize("end", ["close", "drop"])
def test_a_stream_that_waits_for_storage_is_left_to_itself(
    dataset, faults, monkeypatch, tmp_path, readers, end
):
    dataset = shutil.copytree(dataset, tmp_path / "own")  # which no other thread reads
    monkeypatch.setattr("shards.storage.local.LocalStore.readers", readers)
    index = shards.open_index(dataset)
    options = {"seed": 0, "global_batch_size": index.sequences("train")}
    with ShardStream(dataset, **options) as stream:
        whole = [batch.ids.tolist() for batch in islice(stream, 3)]
    monkeypatch.setattr("shards.read.stream.LEAVE", 0.01)
    monkeypatch.setattr("t5vae.common.storage.LONGEST", 0.05)
    once = len(index.split_blocks("train")) + sum(s.split == "train" for s in index.shards)
    faults.strike("/own/train-", chain(repeat(0, once), repeat(errno.EIO)))
    stream = ShardStream(dataset, **options)
    seen = [next(stream).ids.tolist()]
    assert faults.met.wait(60)
    waiting = stream._thread
    if end == "close":
        stream.close()
        assert waiting.is_alive()
        faults.clear()
        seen += [batch.ids.tolist() for batch in islice(stream, 2)]
        stream.close()
        assert seen == whole
    else:
        del stream
        gc.collect()
        assert waiting.is_alive()
        faults.clear()
    waiting.join(60)
    assert not waiting.is_alive()
