"""The data of `shards.py`: generated lines, a dataset of them, and one of a billion sequences."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

PIECES = 16_384
MAX_LENGTH = 32
BILLION = 10**9


def generated_lines(count: int, seed: int = 0) -> list[str]:
    """Unique lines like one-line statements: identifiers of a Zipf law between punctuation."""
    rng = np.random.default_rng(0)  # the same names for every seed
    ends = ("a", "e", "i", "o", "u", "an", "er", "st")
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in ends]
    names = ["".join(rng.choice(syllables, n)) for n in rng.integers(1, 5, 20_000)]
    rng = np.random.default_rng(seed + 1)
    share = np.cumsum(1 / np.arange(1, len(names) + 1))
    marks = (".", "(", ", ", ") ", " = ", " + ", "[", "] ", " in ", ": ")
    lines: dict[str, None] = {}
    while len(lines) < count:
        terms = np.clip(np.rint(rng.lognormal(1.68, 0.5, 2**16)), 1, 16).astype(int)
        pieces = np.empty((terms.sum(), 2), object)
        drawn = np.searchsorted(share, rng.uniform(0, share[-1], len(pieces)))
        pieces[:, 0] = np.array(names, object)[drawn]
        pieces[:, 1] = np.array(marks, object)[rng.integers(0, len(marks), len(pieces))]
        flat, last = pieces.ravel().tolist(), 2 * np.cumsum(terms)
        for first, end in zip((last - 2 * terms).tolist(), last.tolist(), strict=True):
            lines["".join(flat[first : end - 1])] = None
    return list(lines)[:count]


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def make_sequences(data: Path, lines: list[str]) -> None:
    """Build DATA/t5vae from the lines, and copy its sequences to the arrays of DATA/limit."""
    import shards

    some = write_lines(data / "some.txt", lines[: 2**17])
    trained = data / "vocabulary"
    shards.build(some, trained, tokenizer=f"train:{PIECES}", max_length=MAX_LENGTH)
    index = shards.build(
        write_lines(data / "lines.txt", lines),
        data / "t5vae",
        tokenizer=trained / "tokenizer",
        max_length=MAX_LENGTH,
        valid_fraction=0,
    )
    tokens, lengths = [], []
    count, size = index.sequences("train"), 2**16
    for first in range(0, count, size):
        ids, of_row = index.read("train", np.arange(first, min(first + size, count)))
        tokens.append(ids[np.arange(ids.shape[1]) < of_row[:, None]])
        lengths.append(of_row)
    folder = data / "limit"
    folder.mkdir()
    np.save(folder / "tokens.npy", np.concatenate(tokens).astype(np.uint16))
    np.save(folder / "lengths.npy", np.concatenate(lengths).astype(np.uint16))


def make_billion(data: Path) -> None:
    """DATA/billion/t5vae: the dataset's full blocks listed again and again, as other shards'."""
    import shards

    source, folder = data / "t5vae", data / "billion" / "t5vae"
    shutil.copytree(source, folder, copy_function=os.link)
    for name in ("index.json", "blocks.npy"):
        (folder / name).unlink()
    index = json.loads((source / "index.json").read_text())
    reader = shards.open_index(source).reader("train")
    full = np.flatnonzero(reader.table["sequences"] == index["block_size"])
    once, histogram = reader.table[full], np.zeros(index["max_length"] + 1, np.int64)
    for number in full.tolist():
        histogram += np.bincount(reader.read(number)[0], minlength=len(histogram))
    times = -(-BILLION // int(once["sequences"].sum()))
    own = []
    for number in range(once["shard"].max() + 1):
        its = once[once["shard"] == number]
        totals = {name: int(its[name].sum()) for name in ("sequences", "tokens")}
        end = int(its["tokens_offset"][-1]) + 2 * int(its["tokens"][-1])
        own.append(index["shards"][number] | totals | {"blocks": len(its), "bytes": end})
    blocks = np.tile(once, times)
    blocks["shard"] += np.arange(times).repeat(len(once)) * len(own)
    np.save(folder / "blocks.npy", blocks)
    index["shards"] = own * times
    index["blocks_sha256"] = hashlib.sha256((folder / "blocks.npy").read_bytes()).hexdigest()
    index["splits"]["train"] = {
        "sequences": int(blocks["sequences"].sum()),
        "tokens": int(blocks["tokens"].sum()),
        "blocks": len(blocks),
        "length_histogram": np.trim_zeros(histogram * times, "b").tolist(),
    }
    (folder / "index.json").write_text(json.dumps(index))


def stored_bytes(folder: Path) -> int:
    """What the files of a dataset take, but for the tokenizer."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sum(file.stat().st_size for file in files if file.parent.name != "tokenizer")
