"""The contenders of `shards.py`: each stores the same sequences and loads padded batches of them.

A contender runs in a process of its own, in a Python that has its package:

    _contenders.py write NAME DATA           store the sequences in DATA/NAME
    _contenders.py start NAME DATA OPTIONS   load one batch; tell the seconds and bytes that took
    _contenders.py serve NAME DATA OPTIONS   for each number of seconds read from standard input,
                                             load batches for so much CPU; tell the rows and the CPU

DATA/limit holds the sequences as plain arrays: tokens.npy, all of them one after the other, and
lengths.npy, both uint16. A batch is int64 ids [512, T], padded with 0 to the longest of it rounded
up to 8, and int64 lengths [512].
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _timing import cpu_seconds, status_bytes

BATCH = 512
ROUND = 8
WEBDATASET_ROWS = 100_000  # enough for so slow a reader

Padded = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Sequences:
    """Sequence i is tokens[starts[i] : starts[i] + lengths[i]]."""

    tokens: np.ndarray  # uint16, memory-mapped
    starts: np.ndarray  # int64
    lengths: np.ndarray  # int64

    @classmethod
    def open(cls, folder: Path) -> "Sequences":
        tokens = np.asarray(np.load(folder / "tokens.npy", mmap_mode="r"))
        lengths = np.load(folder / "lengths.npy").astype(np.int64)
        return cls(tokens, np.cumsum(lengths) - lengths, lengths)

    def __iter__(self) -> Iterator[np.ndarray]:
        for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True):
            yield self.tokens[start : start + length]


def limit(folder: Path, plain: bool = False, fresh: bool = True) -> Iterator[Padded]:
    return by_index(folder) if plain else by_views(folder, fresh)


def by_views(folder: Path, fresh: bool) -> Iterator[Padded]:
    """Gather rows by a random permutation of all sequences, drawn anew each epoch if `fresh`.

    A row is one copy of 2T bytes, from a view of which element s is tokens[s : s + T]; then what
    belongs to the sequences behind it is masked, and the rest widened.
    """
    sequences = Sequences.open(folder)
    tokens, starts, lengths = sequences.tokens, sequences.starts, sequences.lengths
    places = starts << 16 | lengths  # one look-up a row instead of two

    @lru_cache
    def rows_of(T: int) -> tuple[np.ndarray, np.ndarray]:
        windows = np.ndarray(len(tokens) - T + 1, np.dtype((np.void, 2 * T)), tokens, strides=(2,))
        kept = np.arange(T) < np.arange(T + 1)[:, None]
        return windows, np.where(kept, 0xFFFF, 0).astype(np.uint16)

    behind = len(tokens) - starts >= lengths.max() + ROUND  # all but the last few sequences
    order = np.flatnonzero(behind).astype(np.uint32)
    rng = np.random.default_rng(0)
    rng.shuffle(order)
    while True:
        for first in range(0, len(order) - BATCH + 1, BATCH):
            place = places.take(order[first : first + BATCH])
            start, length = place >> 16, place & 0xFFFF
            T = -(-int(length.max()) // ROUND) * ROUND
            windows, kept = rows_of(T)
            ids = windows[start].view(np.uint16).reshape(BATCH, T)
            ids &= kept.take(length, axis=0)
            yield torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(length)
        if fresh:
            rng.shuffle(order)


def by_index(folder: Path) -> Iterator[Padded]:
    """Gather rows as one writes it first: by a matrix of indices into the array, and a mask."""
    sequences = Sequences.open(folder)
    tokens, starts, lengths = sequences.tokens, sequences.starts, sequences.lengths
    order = np.random.default_rng(0).permutation(len(starts))
    while True:
        for first in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[first : first + BATCH]
            length = lengths[rows]
            columns = np.arange(-(-int(length.max()) // ROUND) * ROUND)
            at = np.minimum(starts[rows][:, None] + columns, len(tokens) - 1)
            ids = np.where(columns < length[:, None], tokens[at], 0).astype(np.int64)
            yield torch.from_numpy(ids), torch.from_numpy(length)


def t5vae(folder: Path, world_size: int = 1, **options: Any) -> Iterator[Padded]:
    from shards import ShardStream

    size = BATCH * world_size
    stream = ShardStream(folder, seed=0, global_batch_size=size, world_size=world_size, **options)
    return ((batch.ids, batch.lengths) for batch in stream)


# The peers: one record a sequence, and one collate function for all.


def collate(rows: list[np.ndarray]) -> Padded:
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    T = -(-int(lengths.max()) // ROUND) * ROUND
    ids = np.zeros((len(rows), T), np.int64)
    ids[np.arange(T) < lengths[:, None]] = np.concatenate(rows)
    return torch.from_numpy(ids), torch.from_numpy(lengths)


def from_bytes(rows: Iterable[bytes]) -> Padded:
    return collate([np.frombuffer(row, np.uint16) for row in rows])


def epochs(loader: Iterable[Padded]) -> Iterator[Padded]:
    return chain.from_iterable(repeat(loader))


def write_webdataset(sequences: Sequences, folder: Path) -> None:
    """Twice: as .npy members, which it decodes by itself, and as plain bytes."""
    from webdataset import ShardWriter

    for member, stored in (("npy", np.asarray), ("bin", np.ndarray.tobytes)):
        (folder / member).mkdir()
        pattern = f"{folder}/{member}/%05d.tar"
        with ShardWriter(pattern, maxcount=10_000, mtime=0, verbose=0) as writer:
            for number, row in enumerate(islice(sequences, WEBDATASET_ROWS)):
                writer.write({"__key__": f"{number:08d}", member: stored(row)})


def webdataset(folder: Path, member: str = "npy") -> Iterator[Padded]:
    from webdataset import WebDataset, WebLoader

    shards = sorted(map(str, (folder / member).iterdir()))
    dataset = WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(10_000)
    if member == "npy":
        dataset = dataset.decode()
    pad = collate if member == "npy" else from_bytes
    dataset = dataset.to_tuple(member).batched(
        BATCH, collation_fn=lambda rows: pad([row for (row,) in rows]), partial=False
    )
    return epochs(WebLoader(dataset, batch_size=None, num_workers=0))


def write_mosaic(sequences: Sequences, folder: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"tokens": "bytes"}) as writer:
        for row in sequences:
            writer.write({"tokens": row.tobytes()})


def mosaic(folder: Path) -> Iterator[Padded]:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    return epochs(
        DataLoader(
            dataset,
            batch_size=BATCH,
            num_workers=0,
            collate_fn=lambda samples: from_bytes(sample["tokens"] for sample in samples),
            drop_last=True,
        )
    )


def records(flat: Path) -> Iterator[np.ndarray]:
    yield from Sequences.open(flat)


def write_litdata(_: Sequences, folder: Path) -> None:
    from litdata import optimize

    optimize(
        records,
        [folder.with_name("limit")],
        str(folder),
        chunk_bytes="64MB",
        num_workers=1,
        verbose=False,
    )


def litdata(folder: Path) -> Iterator[Padded]:
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(str(folder), shuffle=True)
    return epochs(
        StreamingDataLoader(
            dataset, batch_size=BATCH, num_workers=0, collate_fn=collate, drop_last=True
        )
    )


class Contender(NamedTuple):
    load: Callable[..., Iterator[Padded]]
    module: str
    write: Callable[[Sequences, Path], None] | None = None


CONTENDERS = {
    "limit": Contender(limit, "numpy"),
    "t5vae": Contender(t5vae, "shards.read.stream"),
    "webdataset": Contender(webdataset, "webdataset", write_webdataset),
    "mosaic": Contender(mosaic, "streaming", write_mosaic),
    "litdata": Contender(litdata, "litdata", write_litdata),
}


def check(ids: torch.Tensor, lengths: torch.Tensor) -> None:
    """That a batch is what all are measured by."""
    T = ids.shape[1]
    assert ids.dtype == lengths.dtype == torch.int64
    assert 0 <= T - int(lengths.max()) < ROUND
    assert torch.equal(ids != 0, torch.arange(T) < lengths[:, None])


def start(load: Callable[[], Iterator[Padded]]) -> None:
    before, begin = status_bytes("VmHWM"), time.perf_counter()
    batch = next(load())
    seconds, after = time.perf_counter() - begin, status_bytes("VmHWM")
    check(*batch)
    print(json.dumps({"seconds": seconds, "bytes": after - before}))


def serve(batches: Iterator[Padded]) -> None:
    check(*next(batches))
    for line in sys.stdin:
        rows, begin = 0, cpu_seconds()
        while cpu_seconds() < begin + float(line):
            for _ in range(16):  # looking at the clock costs too
                rows += len(next(batches)[0])
        print(json.dumps({"rows": rows, "cpu": cpu_seconds() - begin}), flush=True)


def main(action: str, name: str, data: Path, options: str = "{}") -> None:
    contender = CONTENDERS[name]
    import_module(contender.module)
    load = partial(contender.load, data / name, **json.loads(options))
    if action == "write":
        assert contender.write
        (data / name).mkdir()
        contender.write(Sequences.open(data / "limit"), data / name)
    elif action == "start":
        start(load)
    else:
        serve(load())


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `shards` is the package, not the script here
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
