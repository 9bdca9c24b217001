"""Shards from a stranger: an index, blocks and tar files, whose checksums all hold."""

import hashlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shards
from t5vae.common.errors import UserError
from tests.strangers.conftest import Handed, refusal
from tests.strangers.watch import watched

HUGE = 2**60


@contextmanager
def _edited(folder: Path) -> Iterator[dict[str, Any]]:
    """The index, to be changed."""
    index = json.loads((folder / "index.json").read_text())
    yield index
    (folder / "index.json").write_text(json.dumps(index))


def put(place: str, value: Any) -> Callable[[Handed], None]:
    """Sets a value of the index."""

    def change(handed: Handed) -> None:
        with _edited(handed.shards) as index:
            *path, leaf = [int(key) if key.isdigit() else key for key in place.split("/")]
            section: Any = index
            for key in path:
                section = section[key]
            section[leaf] = value

    return change


def raw(content: bytes) -> Callable[[Handed], None]:
    """Puts something else in the place of index.json."""
    return lambda handed: bool((handed.shards / "index.json").write_bytes(content))


def nested(handed: Handed) -> None:
    text = (handed.shards / "index.json").read_text()
    deep = "[" * 10**6 + "]" * 10**6
    (handed.shards / "index.json").write_text(
        text.replace('"recipe": {', f'"recipe": {{"x": {deep},')
    )


def sparse(name: str, size: int) -> Callable[[Handed], None]:
    def change(handed: Handed) -> None:
        (handed.shards / name).unlink(missing_ok=True)
        (handed.shards / name).touch()
        os.truncate(handed.shards / name, size)

    return change


def link(name: str, target: str) -> Callable[[Handed], None]:
    def change(handed: Handed) -> None:
        path = handed.shards / name
        path.rename(handed.folder / "moved")
        path.symlink_to(
            {"secret": handed.secret, "out": handed.folder / "moved"}.get(target, target)
        )

    return change


def fifo(name: str) -> Callable[[Handed], None]:
    def change(handed: Handed) -> None:
        (handed.shards / name).unlink()
        os.mkfifo(handed.shards / name)

    return change


def folder(name: str) -> Callable[[Handed], None]:
    def change(handed: Handed) -> None:
        (handed.shards / name).unlink()
        (handed.shards / name).mkdir()

    return change


def write_table(handed: Handed, content: bytes) -> None:
    """A blocks.npy whose checksum the index has."""
    (handed.shards / "blocks.npy").write_bytes(content)
    put("blocks_sha256", hashlib.sha256(content).hexdigest())(handed)


def npy(array: np.ndarray, **header: Any) -> bytes:
    file = io.BytesIO()
    shown = np.lib.format.header_data_from_array_1_0(array) | header
    np.lib.format.write_array_header_1_0(file, shown)
    return file.getvalue() + array.tobytes()


def table(change: Callable[[np.ndarray], Any]) -> Callable[[Handed], None]:
    """Changes the table of blocks, a row for each split."""

    def apply(handed: Handed) -> None:
        blocks = np.load(handed.shards / "blocks.npy")
        changed = change(blocks)
        write_table(handed, npy(blocks) if changed is None else changed)

    return apply


def column(name: str, value: int, row: int = 0) -> Callable[[Handed], None]:
    return table(lambda blocks: blocks[name].__setitem__(row, value))


def evil_pickle(handed: Handed) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch unpickled",)

    file = io.BytesIO()
    np.save(file, np.array([Evil(), Evil()], object), allow_pickle=True)
    write_table(handed, file.getvalue())


def block(change: Callable[[np.ndarray, np.ndarray], Any]) -> Callable[[Handed], None]:
    """Changes the arrays of the first block, and its checksums with them."""

    def apply(handed: Handed) -> None:
        blocks = np.load(handed.shards / "blocks.npy")
        shard = handed.shards / "train-00000.tar"
        content = bytearray(shard.read_bytes())
        entry = blocks[0]
        lengths = np.frombuffer(content, "<u2", entry["sequences"], entry["lengths_offset"])
        tokens = np.frombuffer(content, "<u2", entry["tokens"], entry["tokens_offset"])
        change(lengths, tokens)
        blocks["crc32"][0] = zlib.crc32(tokens.data, zlib.crc32(lengths.data))
        del lengths, tokens
        shard.write_bytes(content)
        put("shards/0/sha256", hashlib.sha256(content).hexdigest())(handed)
        write_table(handed, npy(blocks))

    return apply


def zeroes(handed: Handed) -> None:
    """A block of 2^40 tokens that a sparse file holds, its totals in order."""
    blocks = np.load(handed.shards / "blocks.npy")
    blocks["tokens"][0] = 2**40
    size = int(blocks["tokens_offset"][0]) + 2**41 + 2048
    os.truncate(handed.shards / "train-00000.tar", size)
    with _edited(handed.shards) as index:
        for part in (index["splits"]["train"], index["shards"][0]):
            part["tokens"] = 2**40
        index["shards"][0]["bytes"] = size
        index["splits"]["train"]["length_histogram"] = [0] * 1023 + [1077]
    write_table(handed, npy(blocks))


# What every command sees as it opens the index.
INDEXES = {
    "array": raw(b"[]"),
    "binary": raw(os.urandom(64)),
    "deep": raw(b"[" * 10**6),
    "deep inside": nested,
    "digits": raw(b'{"format_version": ' + b"9" * 10**5 + b"}"),
    "nan": put("recipe/bytes", float("nan")),
    "large": sparse("index.json", 100 * 2**30),
    "zeros": lambda handed: (handed.shards / "index.json").write_bytes(b"0" * (65 * 2**20)),
    "link to the secret": link("index.json", "secret"),
    "link to zeros": link("index.json", "/dev/zero"),
    "link out": link("index.json", "out"),
    "fifo": fifo("index.json"),
    "folder": folder("index.json"),
    "a name up": put("shards/0/name", "../train-00000.tar"),
    "a name down": put("shards/0/name", "tokenizer/x.tar"),
    "an absolute name": put("shards/0/name", "/etc/x.tar"),
    "the table's name": put("shards/0/name", "blocks.npy"),
    "the index's name": put("shards/0/name", "index.json"),
    "the tokenizer's name": put("shards/0/name", "tokenizer"),
    "a hidden name": put("shards/0/name", ".tar"),
    "a name with a line's end": put("shards/0/name", "x.tar\n"),
    "a split's path": put("splits/..%2f", {}),
    "a split that clears the screen": put("shards/0/split", "\x1b[2J"),
    "no train": put("splits", {}),
    "another split": put("shards/0/split", "test"),
    "no length": put("max_length", 0),
    "a length beyond 16 bits": put("max_length", 2**16),
    "a huge vocabulary": put("vocab_size", HUGE),
    "no vocabulary": put("vocab_size", 0),
    "a pad beyond": put("pad_id", 371),
    "an end beyond": put("eos_id", 10**6),
    "a negative end": put("eos_id", -1),
    "negative sequences": put("splits/train/sequences", -1),
    "no sequences": put("splits/train/sequences", 0),
    "huge sequences": put("splits/train/sequences", HUGE),
    "huge tokens": put("shards/0/tokens", 10**30),
    "negative bytes": put("shards/0/bytes", -1),
    "huge blocks": put("shards/0/blocks", HUGE),
    "block size": put("block_size", HUGE),
    "no block size": put("block_size", -16),
    "a long histogram": put("splits/train/length_histogram", [0] * 10**7),
    "no texts": put("unique_lengths", [0]),
    "huge texts": put("unique_lengths", [HUGE]),
    "recipe": put("recipe", []),
    "no recipe": put("recipe", {}),
    "a recipe in a recipe": put("recipe/source", {"x": []}),
    "another overflow": put("recipe/overflow", "x"),
    "no overflow": put("recipe/overflow", None),
    "a tokenizer that clears the screen": put("recipe/tokenizer", "\x1b[2J"),
    "half a character": put("recipe/tokenizer", "\ud800"),
    "another max_length": put("recipe/max_length", 2**40),
    "dropped": put("dropped", {"\x1b]0;evil\x07": 1}),
    "dropped by markup": put("dropped", {"[/x]": 1}),
    "no sha256": put("blocks_sha256", "../x"),
    "no texts altered": put("altered", {"encoded": 0, "altered": 0, "characters": {}}),
}

# What every command sees that reads sequences.
BLOCKS = {
    "pickle": evil_pickle,
    "numbers": table(lambda blocks: npy(np.zeros(9))),
    "no table": table(lambda blocks: b"\x93NUMPY" + b"x" * 90),
    "empty": lambda handed: write_table(handed, b""),
    "huge shape": table(lambda blocks: npy(blocks, shape=(2**40,))),
    "negative shape": table(lambda blocks: npy(blocks, shape=(-1,))),
    "two dimensions": table(lambda blocks: npy(blocks, shape=(2, 1))),
    "deep header": table(lambda b: npy(b).replace(b"{'descr'", b"(" * 40 + b"{'descr'")),
    "no blocks": table(lambda blocks: npy(blocks[:0])),
    "a block more": table(lambda blocks: npy(blocks[[0, 0, 1]])),
    "large": sparse("blocks.npy", 100 * 2**30),
    "link": link("blocks.npy", "secret"),
    "fifo": fifo("blocks.npy"),
    "shards": column("shard", 7),
    "negative shard": column("shard", -1),
    "shards upside down": table(lambda blocks: blocks["shard"].__setitem__(slice(None), [1, 0])),
    "no rows": column("sequences", 0),
    "negative rows": column("sequences", -5),
    "other rows": column("sequences", 1000),
    "huge tokens": column("tokens", 2**62),
    "negative tokens": column("tokens", -1),
    "offset beyond": column("tokens_offset", 2**50),
    "negative offset": column("lengths_offset", -8),
    "huge offset": column("lengths_offset", 2**63 - 1),
    "overlapping": table(
        lambda blocks: blocks["tokens_offset"].__setitem__(0, blocks["lengths_offset"][0])
    ),
    "a gap": table(lambda blocks: blocks["lengths_offset"].__setitem__(0, 0)),
    "2^40 zeros": zeroes,
    "totals": put("splits/train/sequences", 1078),
    "totals of a shard": put("shards/0/tokens", 7934),
    "histogram": put("splits/train/length_histogram", [0, 0, 0, 0, 1077]),
    "less bytes": put("shards/0/bytes", 10),
    "huge bytes": put("shards/0/bytes", 2**45),
    "uint32": put("dtype", "uint32"),
    "ids beyond the vocabulary": block(lambda lengths, tokens: tokens.__setitem__(3, 65_000)),
    "lengths of 0": block(
        lambda lengths, tokens: lengths.__setitem__(slice(2), [0, lengths[:2].sum()])
    ),
    "lengths beyond": block(lambda lengths, tokens: lengths.__setitem__(0, 65_535)),
    "shorter lengths": block(lambda lengths, tokens: lengths.__setitem__(0, 1)),
    "shard: link": link("train-00000.tar", "secret"),
    "shard: zeros": link("train-00000.tar", "/dev/zero"),
    "shard: fifo": fifo("train-00000.tar"),
    "shard: folder": folder("train-00000.tar"),
    "shard: sparse": sparse("train-00000.tar", 100 * 2**30),
}


def told(done: Any) -> str:
    """What `t5vae shards verify` says of damage, or any command of what it cannot read."""
    if done.code == 2:
        return refusal(done)
    assert done.deeds == []
    assert done.code == 1
    assert done.out
    assert "\x1b" not in done.out
    return done.out


def opened(handed: Handed) -> None:
    """What training does with its shards."""
    with watched(handed.folder, handed.secret) as watch:
        try:
            for split in ("train", "valid"):
                with shards.ShardStream(
                    "shards", split=split, seed=0, global_batch_size=64
                ) as stream:
                    for _ in range(1200 // 64):
                        next(stream)
        finally:
            assert watch.deeds == []


@pytest.mark.parametrize("evil", INDEXES)
def test_an_evil_index_is_refused(handed, command, evil):
    INDEXES[evil](handed)
    for arguments in (
        ("shards", "inspect", "shards"),
        ("shards", "verify", "shards"),
        ("config", "show", "run/config.yaml", "data.shards=shards"),
    ):
        told(command(*arguments))
    with pytest.raises(UserError):
        opened(handed)


@pytest.mark.parametrize("evil", BLOCKS)
def test_evil_blocks_are_refused(handed, command, evil):
    BLOCKS[evil](handed)
    told(command("shards", "verify", "shards"))
    told(command("shards", "inspect", "shards", "--examples", 2000))
    with pytest.raises(UserError):
        opened(handed)


SOME = [("index", name) for name in ("deep", "huge blocks", "a name up", "a split's path")] + [
    ("blocks", name) for name in ("pickle", "huge shape", "ids beyond the vocabulary", "2^40 zeros")
]


@pytest.mark.parametrize(("where", "evil"), SOME, ids=[" ".join(pair) for pair in SOME])
def test_so_are_they_by_the_commands_of_a_run(handed, refused, where, evil):
    (INDEXES if where == "index" else BLOCKS)[evil](handed)
    (handed.run / "eval.json").unlink()
    refused("eval", "run", "--samples", 2)
    refused("eval", "run", "--shards", "shards", "--samples", 2)
    if where == "index":
        shutil.rmtree(handed.run / "export")
        refused("export", "run")
        refused("plan", "run/config.yaml", "data.shards=shards")
