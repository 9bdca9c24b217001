"""Packing: sequences in a shuffled order into blocks, blocks into tar shards.

A shard is a tar that `webdataset` writes and reads; each record holds one block as two arrays,
`{key}.lengths.npy` and `{key}.tokens.npy`.
"""

import hashlib
import tarfile
import zlib
from pathlib import Path

import numpy as np

from shards.index import BLOCK, Shard, Split
from shards.order import permutation


def gather_ragged(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate tokens[starts[i] : starts[i] + lengths[i]] for all i, without a loop."""
    ends = np.cumsum(lengths)
    shift = np.repeat(starts - (ends - lengths), lengths)
    return tokens[shift + np.arange(len(shift))]


def write_split(
    folder: Path,
    split: str,
    tokens: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    *,
    seed: int,
    dtype: str,
    block_size: int,
    shard_size: int,
) -> tuple[Split, list[Shard], np.ndarray]:
    """Shuffle a split's sequences and write them as shards.

    Args:
        folder: where the shards go.
        split: the split's name, and the beginning of its shards' names.
        tokens: int32, the tokens of all sequences of the corpus.
        starts, lengths: int64 [sequences of this split], where each lies in tokens.
        seed: of the shuffle.
        dtype: "uint16" or "uint32", of the stored tokens.
        block_size: sequences in a block.
        shard_size: a shard is closed once it holds this many bytes.

    Returns:
        The split's totals, its shards, and BLOCK [blocks] with shards counted from 0.
    """
    import webdataset  # imports torch

    order = permutation(len(lengths), seed)
    table = np.zeros(-(-len(order) // block_size), BLOCK)
    pattern = str(folder.absolute()).replace("%", "%%") + f"/{split}-%05d.tar"
    with webdataset.ShardWriter(
        pattern, maxcount=2**62, maxsize=shard_size, mtime=0, verbose=0
    ) as writer:
        for block, entry in enumerate(table):
            mine = order[block * block_size : (block + 1) * block_size]
            record = {
                "lengths.npy": lengths[mine].astype("<u2"),
                "tokens.npy": gather_ragged(tokens, starts[mine], lengths[mine]).astype(dtype),
            }
            writer.write({"__key__": f"{split}-{block:08d}", **record})
            entry["shard"] = writer.shard - 1  # the writer counts the next one
            entry["sequences"], entry["tokens"] = len(mine), len(record["tokens.npy"])
            entry["crc32"] = zlib.crc32(record["tokens.npy"], zlib.crc32(record["lengths.npy"]))

    bounds = np.flatnonzero(np.diff(table["shard"])) + 1
    shards = [
        _close(folder / f"{split}-{number:05d}.tar", split, blocks)
        for number, blocks in enumerate(np.split(table, bounds))
    ]
    totals = Split(
        sequences=len(order),
        tokens=int(lengths.sum()),
        blocks=len(table),
        length_histogram=np.bincount(lengths).tolist(),
    )
    return totals, shards, table


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
