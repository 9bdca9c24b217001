"""The end of a build: sequences become a dataset's folder, with its index."""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from shards.format.index import Altered, Index
from shards.format.tokenizers import fingerprint
from shards.read.orders import CHUNK
from shards.write.corpora import File, combine
from shards.write.halted import forget
from shards.write.pack import write_splits
from shards.write.pipeline import Pipeline
from shards.write.stamps import write_stamp
from shards.write.workers import Counts
from t5vae.common.errors import UserError
from t5vae.common.files import fsync
from t5vae.common.storage import patiently

LARGEST_BLOCK, BLOCK_TOKENS = 4096, 2**18
SHOWN_CHARACTERS = 20


def finish(
    pipeline: Pipeline, folder: Path, out: Path, recipe: dict[str, Any], files: list[File] | None
) -> None:
    """Make the dataset in `folder`, which then appears at `out` whole.

    Args:
        pipeline: after its last stage.
        folder: on the same file system as `out`.
        out: where the dataset goes.
        recipe: what it is made from.
        files: the input's, by which it is known again; None of a pipe.
    """
    tally = _tally(pipeline)
    tokenized, tokenizer = pipeline.tokenized, pipeline.tokenizer
    sequences = _sum(done["sequences"] for done in tokenized)
    if not sequences["train"]:
        why = ", ".join(f"{count} {reason}" for reason, count in tally["dropped"].items())
        if held_out := sequences["valid"]:
            why = f"{held_out} held out: lower --valid-fraction, to 0 for none"
        forget(pipeline.folder)  # other texts or options are read anew
        raise UserError(
            f"{recipe['source']} has no text to train on: {tally['texts_read']} read "
            f"({why or 'empty'})"
        )
    options = pipeline.options
    block_size = options.block_size or _block_size(tokenized)

    def pack() -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)
        shutil.copytree(pipeline.folder / "tokenizer", folder / "tokenizer")
        splits, shards, blocks = write_splits(
            folder,
            pipeline.tokens,
            [done["sequences"] for done in tokenized],
            block_size=block_size,
            shard_size=options.shard_size,
        )
        np.save(folder / "blocks.npy", blocks)
        index = Index(
            dtype=pipeline.dtype,
            block_size=block_size,
            max_length=options.max_length,
            vocab_size=len(tokenizer),
            pad_id=tokenizer.pad_token_id,
            eos_id=tokenizer.eos_token_id,
            tokenizer_fingerprint=fingerprint(tokenizer),
            splits=splits,
            shards=shards,
            blocks_sha256=hashlib.sha256((folder / "blocks.npy").read_bytes()).hexdigest(),
            **tally,
            recipe=recipe
            | {"sha256": combine(d for done in pipeline.read for d in done["digests"])},
            path=str(folder),
            sha256="",
        )
        (folder / "index.json").write_text(index.as_json())
        write_stamp(folder, files)
        for path in [*folder.rglob("*"), folder]:
            fsync(path)

    patiently(pack, str(folder))
    os.rename(folder, out.resolve())
    fsync(out.resolve().parent)


def _block_size(tokenized: list[Counts]) -> int:
    """Blocks that a reader can hold hundreds of, however long the sequences are."""
    sequences = sum(sum(done["sequences"].values()) for done in tokenized)
    tokens = sum(done["tokens"] for done in tokenized)
    fitting = BLOCK_TOKENS * sequences // tokens
    return min(LARGEST_BLOCK, max(CHUNK, 2 ** (fitting.bit_length() - 1)))


def _sum(counts: Iterable[dict[str, int]]) -> Counter[str]:
    return sum(map(Counter, counts), Counter())


def _tally(pipeline: Pipeline) -> dict[str, Any]:
    """The fields of the index that the stages counted."""
    read, cut, encoded, tokenized = (
        pipeline.read,
        pipeline.cut,
        pipeline.encoded,
        pipeline.tokenized,
    )
    stages = (*read, *cut, *encoded, *tokenized)
    dropped = _sum([*(done["dropped"] for done in stages), pipeline.merged])
    whole = cut or encoded or tokenized  # whichever saw the texts before they were cut
    lengths = np.sum([done["lengths"] for done in whole], axis=0)
    return {
        "texts_read": sum(done["texts"] for done in read),
        "dropped": dict(sorted(dropped.items())),
        "overlong": sum(done["overlong"] for done in whole),
        "unique_lengths": np.trim_zeros(lengths, "b").tolist(),
        "altered": _altered(encoded),
    }


def _altered(encoded: list[Counts]) -> Altered | None:
    altered = sum(done["altered"] for done in encoded)
    if not altered:
        return None
    eighths = sorted({eighth for done in encoded for eighth in done["lost"]})
    lost: Counter[str] = Counter()
    for eighth in eighths:  # of what is lost equally often, the first in the order of the keys
        its = _sum(done["lost"].get(eighth, {}) for done in encoded)
        lost.update(dict(its.most_common()))
    return Altered(
        encoded=sum(done["encoded"] for done in encoded),
        altered=altered,
        characters=dict(lost.most_common(SHOWN_CHARACTERS)),
    )
