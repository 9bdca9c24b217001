"""A checkpoint compared with its hashes by ranks, here threads, together."""

import errno
import hashlib
import os
import sys
import threading
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from t5vae.checkpoint import verifying
from t5vae.checkpoint.manifest import read_manifest, verify
from t5vae.checkpoint.rank_files import file_name, write
from t5vae.checkpoint.verifying import verify_together
from t5vae.cluster.agreement import gather_objects
from t5vae.common.errors import StorageError, UserError


@pytest.fixture
def checkpoint(tmp_path, save):
    return save(tmp_path / "checkpoints", 10, world=3)


def change(path):
    """One bit, so that the size stays."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def verified(together):
    """What each of some ranks hears of a checkpoint."""

    def run(checkpoint, world):
        files = read_manifest(checkpoint)["files"]
        return together(world).run(lambda rank: verify_together(checkpoint, files))

    return run


@pytest.fixture
def reads(monkeypatch):
    """Bytes that are read of each file, by the thread of a rank."""
    found, paths, reads, opens = {}, {}, os.preadv, os.open

    def opening(path, *args, **more):
        descriptor = opens(path, *args, **more)
        paths[descriptor] = os.path.basename(path)
        return descriptor

    def reading(descriptor, into, at):
        count = reads(descriptor, into, at)
        found.setdefault(threading.get_ident(), Counter())[paths[descriptor]] += count
        return count

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "preadv", reading)
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_a_whole_checkpoint_is_whole_and_each_rank_reads_its_part(
    checkpoint, verified, reads, world
):
    sizes = {name: of["bytes"] for name, of in read_manifest(checkpoint)["files"].items()}
    assert [told.result() for told in verified(checkpoint, world)] == [None] * world
    assert sum(reads.values(), Counter()) == sizes
    if world >= 3:
        assert sorted(len(files) for files in reads.values()) == [1, 1, 1]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_damage_in_any_file_is_told_to_all_ranks_as_one_process_tells_it(
    checkpoint, verified, world, damaged
):
    path = checkpoint / file_name(damaged)
    change(path)
    assert verify(checkpoint) == f"{path.name} has changed"
    heard = [told.result() for told in verified(checkpoint, world)]
    assert heard == [f"{path.name} has changed"] * world
    size = path.stat().st_size
    os.truncate(path, size - 1)
    heard = [told.result() for told in verified(checkpoint, world)]
    assert heard == [f"{path.name} has {size - 1} bytes, not {size}"] * world
    path.unlink()
    assert [told.result() for told in verified(checkpoint, world)] == [
        f"{path.name} is missing"
    ] * world


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, StorageError), (errno.EACCES, UserError)])
@pytest.mark.parametrize("call", ["open", "stat"])
def test_what_fails_one_rank_is_raised_by_all_and_is_no_damage(
    checkpoint, verified, failing, number, kind, call
):
    change(checkpoint / file_name(0))  # found at the same time
    failing(call, file_name(1), number)
    errors = [told.exception() for told in verified(checkpoint, 3)]
    assert {type(error).__mro__[1] for error in errors} == {kind}
    assert len({str(error) for error in errors}) == 1
    assert "rank 1 of 3" in str(errors[0])
    assert file_name(1) in str(errors[0])


def test_storage_that_fails_for_a_while_is_read_again(checkpoint, verified, failing):
    met = failing("open", file_name(1), errno.ESTALE, times=2)
    assert [told.result() for told in verified(checkpoint, 3)] == [None] * 3
    assert len(met) == 2


def test_ranks_meet_while_one_of_them_hashes_so_that_none_waits_for_long(
    tmp_path, checkpoint, together, monkeypatch
):
    """Rank 1 has a file of 40 chunks, the others have one of a chunk."""
    monkeypatch.setattr(verifying, "CHUNK", 2**12)
    monkeypatch.setattr(verifying, "SECONDS", 0.0)
    files = read_manifest(checkpoint)["files"]
    path = checkpoint / file_name(1)
    path.write_bytes(os.urandom(40 * 2**12))
    files[path.name] = {"bytes": 40 * 2**12, "sha256": "0" * 64}
    met, read, real = Counter(), Counter(), verifying.gather_objects
    most = 0

    def meeting(own):
        nonlocal most
        rank = verifying.dist.get_rank()
        met[rank] += 1
        most, read[rank] = max(most, read[rank]), 0
        return real(own)

    preadv = os.preadv

    def reading(descriptor, into, at):
        read[verifying.dist.get_rank()] += 1
        return preadv(descriptor, into, at)

    monkeypatch.setattr(verifying, "gather_objects", meeting)
    monkeypatch.setattr(os, "preadv", reading)
    heard = [
        told.result() for told in together(3).run(lambda _: verify_together(checkpoint, files))
    ]
    assert heard == [f"{path.name} has changed"] * 3
    assert set(met.values()) == {max(met.values())}
    assert max(met.values()) >= 40
    assert most == 1  # reads between two meetings


def test_a_file_of_many_chunks_is_opened_once_and_takes_the_memory_of_one(
    tmp_path, together, monkeypatch, reads
):
    monkeypatch.setattr(verifying, "CHUNK", 2**10)
    path = tmp_path / file_name(0)
    files = {path.name: write(path, {"weight/a/0": torch.zeros(5000)}, {})}
    made, opened, real = [], [], os.open
    monkeypatch.setattr(
        verifying, "bytearray", lambda size: made.append(size) or bytearray(size), raising=False
    )
    monkeypatch.setattr(
        os, "open", lambda *args, **more: opened.append(args) or real(*args, **more)
    )
    assert together(1).run(lambda _: verify_together(tmp_path, files))[0].result() is None
    assert made == [2**10]
    assert len(opened) == 1


PATIENCE, SLOW = 2.0, 4.0  # seconds


def rank_main(rank: int, folder: Path) -> None:
    """Rank 1's disk takes twice as long as ranks wait for each other."""
    limit = timedelta(seconds=PATIENCE)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit
    )
    path, content = folder / file_name(rank), os.urandom(2**14)
    path.write_bytes(content)
    of = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    files = {name: each for name, each in gather_objects((path.name, of))}
    verifying.CHUNK, verifying.SECONDS, preadv = 2**10, 0.5, os.preadv

    def reading(*args):
        time.sleep(SLOW / 16)
        return preadv(*args)

    if rank == 1:
        os.preadv = reading
    began = time.monotonic()
    assert verify_together(folder, files) is None
    (folder / f"{rank}.seconds").write_text(str(time.monotonic() - began))
    dist.destroy_process_group()


@pytest.mark.distributed
def test_a_rank_may_hash_for_longer_than_ranks_wait_for_each_other(run_ranks, tmp_path):
    run_ranks(__file__, 2, tmp_path, PYTHONPATH=str(Path(__file__).parents[2]))
    for rank in range(2):
        assert float((tmp_path / f"{rank}.seconds").read_text()) > PATIENCE


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
