"""Packing: sequences into blocks, blocks into tar shards.

A shard is a tar that `webdataset` writes and reads; each record holds one block as two arrays,
`{key}.lengths.npy` and `{key}.tokens.npy`.
"""

import hashlib
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from shards.format.blocks import BLOCK
from shards.format.index import Shard, Split
from shards.write.spool import damaged
from t5vae.common.progress import Advance, stage

Sequences = tuple[np.ndarray, np.ndarray]
"""lengths uint16 [n], and tokens uint16 or uint32 [sum of lengths], one after the other."""


def write_splits(
    folder: Path,
    tokens: list[Path],
    sequences: list[dict[str, int]],
    *,
    block_size: int,
    shard_size: int,
) -> tuple[dict[str, Split], list[Shard], np.ndarray]:
    """Write all splits as shards.

    Args:
        folder: where the shards go.
        tokens: the files of `shards.write.stages.Tokenize`, in their order.
        sequences: how many each of them holds of each split.
        block_size: sequences in a block.
        shard_size: a shard is closed once it holds this many bytes.

    Returns:
        The totals of the splits that have sequences, all shards, and BLOCK [blocks].
    """
    splits: dict[str, Split] = {}
    shards: list[Shard] = []
    tables: list[np.ndarray] = []
    with stage("packed the sequences", sum(sum(part.values()) for part in sequences)) as advance:
        for split in ("train", "valid"):
            holding = [
                path for path, part in zip(tokens, sequences, strict=True) if part.get(split)
            ]
            if not holding:
                continue
            splits[split], its_shards, table = _write_split(
                folder, split, _load(split, holding), block_size, shard_size, advance
            )
            table["shard"] += len(shards)
            shards += its_shards
            tables.append(table)
    return splits, shards, np.concatenate(tables)


def _load(split: str, paths: list[Path]) -> Iterator[Sequences]:
    for path in paths:
        try:
            with np.load(path) as part:
                sequences = part[f"{split}_lengths"], part[f"{split}_tokens"]
        except (BadZipFile, EOFError, KeyError, ValueError, zlib.error):
            raise damaged(path) from None
        yield sequences


def _write_split(
    folder: Path,
    split: str,
    parts: Iterable[Sequences],
    block_size: int,
    shard_size: int,
    advance: Advance,
) -> tuple[Split, list[Shard], np.ndarray]:
    """Write a split's sequences in the order in which they come; shards are counted from 0."""
    import webdataset  # imports torch

    entries: list[np.ndarray] = []
    histogram = np.zeros(2**16, np.int64)
    pattern = str(folder.absolute()).replace("%", "%%") + f"/{split}-%05d.tar"
    with webdataset.ShardWriter(
        pattern, maxcount=2**62, maxsize=shard_size, mtime=0, verbose=0
    ) as writer:
        for number, (lengths, tokens) in enumerate(blocks(parts, block_size)):
            record = {"lengths.npy": lengths, "tokens.npy": tokens}
            writer.write({"__key__": f"{split}-{number:08d}", **record})
            entry = np.zeros(1, BLOCK)
            entry["shard"] = writer.shard - 1  # the writer counts the next one
            entry["sequences"], entry["tokens"] = len(lengths), len(tokens)
            entry["crc32"] = zlib.crc32(tokens.data, zlib.crc32(lengths.data))
            entries.append(entry)
            histogram += np.bincount(lengths, minlength=len(histogram))
            advance(len(lengths))

    table = np.concatenate(entries)
    bounds = np.flatnonzero(np.diff(table["shard"])) + 1
    shards = [
        _close(folder / f"{split}-{number:05d}.tar", split, its_blocks)
        for number, its_blocks in enumerate(np.split(table, bounds))
    ]
    totals = Split(
        sequences=int(table["sequences"].sum()),
        tokens=int(table["tokens"].sum()),
        blocks=len(table),
        length_histogram=np.trim_zeros(histogram, "b").tolist(),
    )
    return totals, shards, table


def blocks(parts: Iterable[Sequences], block_size: int) -> Iterator[Sequences]:
    """Cut sequences into blocks of block_size; the last may be shorter."""
    held: Sequences = np.empty(0, np.uint16), np.empty(0, np.uint16)
    for part in parts:
        lengths, tokens = map(np.concatenate, zip(held, part, strict=True))
        full = len(lengths) - len(lengths) % block_size
        bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        for start in range(0, full, block_size):
            stop = start + block_size
            yield lengths[start:stop], tokens[bounds[start] : bounds[stop]]
        held = lengths[full:], tokens[bounds[full] :]
    if len(held[0]):
        yield held


def _close(path: Path, split: str, table: np.ndarray) -> Shard:
    """Describe a written shard, and note in its blocks' table where their arrays begin."""
    with tarfile.open(path) as tar:
        members = iter(tar)
        for entry in table:
            for name in ("lengths", "tokens"):
                member = next(members)
                content = tar.extractfile(member)
                assert content is not None
                assert member.name.endswith(f".{name}.npy"), member.name
                np.lib.format.read_magic(content)
                np.lib.format.read_array_header_1_0(content)
                entry[f"{name}_offset"] = member.offset_data + content.tell()  # past the header
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(
        name=path.name,
        split=split,
        bytes=path.stat().st_size,
        sha256=digest,
        blocks=len(table),
        sequences=int(table["sequences"].sum()),
        tokens=int(table["tokens"].sum()),
    )
