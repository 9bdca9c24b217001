"""A billion sequences that nobody stored, and what one rank does with them; for `scale.py`.

The dataset's blocks all hold the same bytes, so that a store need keep one; index, table, order,
dealing and checks are the product's own.
"""

import hashlib
import io
import json
import sys
import time
import zlib
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import _report  # noqa: F401  finds the packages
import numpy as np
from _timing import status_bytes

import shards
from shards.format.blocks import BLOCK
from shards.format.index import Index, Shard, Split
from shards.format.tokenizers import fingerprint, load_tokenizer
from shards.storage.kinds import KINDS
from t5vae.evaluation import Training

BILLION, SHARDS, ROWS, MAX_LENGTH = 10**9, 100_000, 4096, 64
VOCABULARY = range(38, 129)  # of the byte tokenizer, those of printable ASCII
GAP = 1024  # bytes of tar and npy headers before an array
RANKS_OF_A_NODE = 8
BATCH = 65_536
LARGE_SHARDS = 107  # of 256 MiB, as `t5vae shards build` makes them


def _block(rows: int) -> tuple[bytes, np.ndarray, int]:
    """A block's bytes from its lengths to its tokens, its lengths, and its crc32."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(2.45, 0.5, rows), 2, MAX_LENGTH).astype("<u2")
    tokens = rng.integers(VOCABULARY.start, VOCABULARY.stop, lengths.sum()).astype("<u2")
    tokens[np.cumsum(lengths, dtype=np.int64) - 1] = 1
    checksum = zlib.crc32(tokens.data, zlib.crc32(lengths.data))
    return lengths.tobytes() + bytes(GAP) + tokens.tobytes(), lengths, checksum


class Made:
    """A store of the dataset of so many sequences.

    Args:
        location: made://SEQUENCES.

    Attributes:
        files, bytes: that were read, by their names, and in all.
    """

    readers = 1

    def __init__(self, location: str, *_: object):
        self.location = location
        self.files: Counter[str] = Counter()
        self.bytes = 0
        self._small, self._content = made(int(location.partition("://")[2]))

    def get(self, name: str, most: int = 0) -> bytes:
        self._count(name, len(self._small[name]))
        return self._small[name]

    def read(self, name: str, offset: int, size: int) -> bytes:
        self._count(name, size)
        return self._content[size]

    def folder(self, name: str) -> Path:
        return tokenizer_folder()

    def _count(self, name: str, size: int) -> None:
        self.files[name] += 1
        self.bytes += size


@cache
def tokenizer_folder() -> Path:
    folder = Path(mkdtemp())
    load_tokenizer("byte").save_pretrained(folder)
    return folder


@cache
def made(sequences: int = BILLION) -> tuple[dict[str, bytes], dict[int, bytes]]:
    """A dataset's small files, and the ranges of its shards by their sizes."""
    blocks = -(-sequences // ROWS)
    in_shards = SHARDS * sequences // BILLION
    full, last = _block(ROWS), _block(sequences - (blocks - 1) * ROWS)
    tokenizer = load_tokenizer("byte")
    table = np.zeros(blocks, BLOCK)
    table["shard"] = np.arange(blocks) * in_shards // blocks
    histogram = np.zeros(MAX_LENGTH + 1, np.int64)
    for of, (_, lengths, checksum), count in (
        (slice(-1), full, blocks - 1),
        (slice(-1, None), last, 1),
    ):
        table["sequences"][of] = len(lengths)
        table["tokens"][of] = lengths.sum(dtype=np.int64)
        table["crc32"][of] = checksum
        histogram += count * np.bincount(lengths, minlength=MAX_LENGTH + 1)
    size = 2 * table["sequences"].astype(np.int64) + GAP + 2 * table["tokens"] + GAP
    begin = np.cumsum(size) - size
    first = np.searchsorted(table["shard"], np.arange(in_shards))
    table["lengths_offset"] = begin - begin[first][table["shard"]] + GAP
    table["tokens_offset"] = table["lengths_offset"] + 2 * table["sequences"] + GAP
    ends = np.append(first[1:], blocks)
    totals = {
        name: np.add.reduceat(table[name].astype(np.int64), first)
        for name in ("sequences", "tokens")
    }
    file = io.BytesIO()
    np.save(file, table)
    names = [f"train-{number:05d}.tar" for number in range(in_shards)]
    index = Index(
        dtype="uint16",
        block_size=ROWS,
        max_length=MAX_LENGTH,
        vocab_size=len(tokenizer),
        pad_id=0,
        eos_id=1,
        tokenizer_fingerprint=fingerprint(tokenizer),
        splits={
            "train": Split(
                sequences=sequences,
                tokens=int(table["tokens"].sum()),
                blocks=blocks,
                length_histogram=np.trim_zeros(histogram, "b").tolist(),
            )
        },
        shards=[
            Shard(
                name=name,
                split="train",
                bytes=int(size[a:b].sum()) + GAP,
                sha256=hashlib.sha256(name.encode()).hexdigest(),
                blocks=int(b - a),
                sequences=int(rows),
                tokens=int(tokens),
            )
            for name, a, b, rows, tokens in zip(
                names, first, ends, totals["sequences"], totals["tokens"], strict=True
            )
        ],
        blocks_sha256=hashlib.sha256(file.getvalue()).hexdigest(),
        texts_read=sequences,
        dropped={},
        overlong=0,
        unique_lengths=np.trim_zeros(histogram, "b").tolist(),
        recipe={"overflow": "drop", "tokenizer": "byte", "sha256": "0"},
        path="",
        sha256="",
    )
    small = {"index.json": index.as_json().encode(), "blocks.npy": file.getvalue()}
    contents = {len(content): content for content, _, _ in (full, last)}
    return small, contents


KINDS["made"] = Made


def open_made(sequences: int = BILLION) -> shards.Dataset:
    made(sequences)
    return shards.open_dataset(f"made://{sequences}")


def stream(
    dataset: shards.Dataset, rank: int, world_size: int, **options: int
) -> shards.ShardStream:
    return shards.ShardStream(
        dataset,
        **{"seed": 0, "global_batch_size": BATCH} | options,
        rank=rank,
        world_size=world_size,
    )


def of_a_rank(world_size: int, steps: int = 16) -> dict[str, float]:
    """What a rank in the middle does: seconds, MiB, files, bytes; in a process of its own."""
    made()
    before, began = status_bytes("VmRSS"), time.perf_counter()
    dataset = open_made()
    (index,) = dataset.indexes
    table = index.blocks
    opened, of_index = time.perf_counter(), status_bytes("VmRSS")
    store = index.store
    store.files.clear()
    store.bytes = 0
    with stream(dataset, world_size // 2, world_size) as batches:
        next(batches)
        first = time.perf_counter()
        for _ in range(steps):
            next(batches)
        ended = time.perf_counter()
        memory = status_bytes("VmHWM") - of_index
    return {
        "ranks": world_size,
        "index_seconds": opened - began,
        "index_mib": (of_index - before) / 2**20,
        "first_seconds": first - opened,
        "step_seconds": (ended - first) / steps,
        "stream_mib": memory / 2**20,
        "files": len(store.files),
        "bytes": store.bytes,
        "blocks": len(table),
    }


def of_a_node(nodes: int, order_version: int) -> dict[str, float]:
    """What a node reads in an epoch, over its fair share; of three nodes the one with most."""
    dataset = open_made()
    (index,) = dataset.indexes
    table = index.split_blocks("train")
    batch = nodes * RANKS_OF_A_NODE * -(-BATCH // (nodes * RANKS_OF_A_NODE))
    steps = -(-BILLION // batch)
    bytes_of_block = 2 * table["tokens"] + 2 * table["sequences"]
    fair = bytes_of_block.sum() / nodes
    over, copied, large = 0.0, 0.0, 0.0
    for node in {0, nodes // 2, nodes - 1}:
        with stream(
            dataset, node, nodes, global_batch_size=batch, order_version=order_version
        ) as batches:
            (opened,) = batches._dealer.windows(0, steps)
            order = batches._dealer.sources[0].order
        blocks = np.unique(np.concatenate([order.blocks_of(name) for name in opened]))
        over = max(over, bytes_of_block[blocks].sum() / fair)
        copied = max(copied, len(np.unique(table["shard"][blocks])) / SHARDS * nodes)
        touched = len(np.unique(blocks * LARGE_SHARDS // len(table)))
        large = max(large, touched / LARGE_SHARDS * nodes)
    return {
        "nodes": nodes,
        "order": order_version,
        "over_fair": float(over),
        "whole_shards": copied,
        "whole_large_shards": large,
    }


def restarts(count: int, among: tuple[int, ...], batch: int = 15_360) -> dict[str, float]:
    """Restart a run that often at other ranks, each on all of a step; the steps that differ."""
    dataset = open_made()
    rng = np.random.default_rng(1)
    position = BILLION - count // 2 * batch  # across the end of an epoch
    wrong, began, worlds = 0, time.perf_counter(), Counter()
    options = {"global_batch_size": batch}
    with stream(dataset, 0, 1, consumed=position, **options) as alone:
        for _ in range(count):
            world_size = int(rng.choice(among))
            worlds[world_size] += 1
            seen = []
            for rank in range(world_size):
                with stream(dataset, rank, world_size, consumed=position, **options) as batches:
                    seen.append(next(batches).sequence)
            expected = next(alone)
            wrong += not np.array_equal(np.concatenate(seen), expected.sequence)
            position = expected.consumed
    return {"restarts": count, "wrong": wrong, "seconds": time.perf_counter() - began} | {
        f"at {world}": worlds[world] for world in among
    }


def of_an_evaluation(sequences: int) -> dict[str, float]:
    """What asking for a thousand texts in the split costs; in a process of its own."""
    dataset = open_made(sequences)
    texts = [*(f"line number {n}" for n in range(999)), *dataset.texts("train", np.arange(1))]
    before, began = status_bytes("VmRSS"), time.perf_counter()
    found = Training(dataset).known(texts)
    return {
        "sequences": sequences,
        "seconds": time.perf_counter() - began,
        "mib": (status_bytes("VmHWM") - before) / 2**20,
        "peak_mib": status_bytes("VmHWM") / 2**20,
        "found": len(found),
    }


if __name__ == "__main__":
    action, *numbers = sys.argv[1:]
    actions = {"rank": of_a_rank, "node": of_a_node, "evaluation": of_an_evaluation}
    print(json.dumps(actions[action](*map(int, numbers))))
