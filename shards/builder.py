"""Build a dataset: read, drop duplicates, split, tokenize, drop what is too long, shuffle, pack."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash

from shards.corpora import Corpus
from shards.errors import UserError
from shards.index import Index, Shard, Split, open_index
from shards.order import CHUNK
from shards.pack import write_split
from shards.progress import say, stage
from shards.tokenizers import (
    encode,
    fingerprint,
    load_tokenizer,
    pieces_to_train,
    special_tokens,
    train_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 8192
LONGEST_COUNTED = 1024  # the last entry of Index.unique_lengths: this length or more


def build(
    source: str | Path | None,
    out: str | Path,
    *,
    tokenizer: str | Path,
    max_length: int,
    format: Literal["text", "jsonl", "csv", "parquet", "python"] = "text",
    column: str | None = None,
    valid_fraction: float = 0.02,
    overflow: Literal["drop", "truncate"] = "drop",
    dedupe: bool = True,
    seed: int = 0,
    block_size: int = 4096,
    shard_size: int = 256 * 2**20,
) -> Index:
    """Build a dataset folder from a corpus; the same input and options give the same bytes.

    A text's split depends on the text alone, so that a grown corpus moves none to the other split.
    A folder already built from the same input with the same options is left as it is.

    Args:
        source, format, column: the corpus, see `shards.corpora.Corpus`.
        out: the dataset folder to make.
        tokenizer: a Hugging Face name, a folder, "byte", or "train:N" (byte-level BPE of N pieces,
            trained on the train split).
        max_length: the most tokens a sequence may have, its end token counted.
        valid_fraction: share of texts held out as the split "valid".
        overflow: what becomes of longer sequences: "drop" or "truncate" (keeping the end token).
        dedupe: keep one of equal texts.
        seed: of the shuffle.
        block_size: sequences in a block, a multiple of 16.
        shard_size: bytes after which a shard is closed.

    Returns:
        The index of the dataset.

    Raises:
        UserError: bad input or options, nothing left to train on, a folder that holds something
            else, or no space left on the disk.
    """
    out = Path(out)
    _check(max_length, valid_fraction, overflow, block_size)
    pieces = pieces_to_train(str(tokenizer))
    corpus = Corpus(source, format, column)
    given = load_tokenizer(tokenizer) if pieces is None else None
    recipe = corpus.describe() | {
        "tokenizer": str(tokenizer) if given is None else fingerprint(given),
        "max_length": max_length,
        "valid_fraction": valid_fraction,
        "overflow": overflow,
        "dedupe": dedupe,
        "seed": seed,
        "block_size": block_size,
        "shard_size": shard_size,
    }
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        return _already_built(out, recipe)

    texts, hashes, dropped = _read(corpus, dedupe)
    read = len(texts) + dropped.get("duplicate", 0) + dropped.get("empty", 0)
    valid = hashes < np.uint64(valid_fraction * 2**64)
    if pieces is not None:
        with stage(f"trained a tokenizer of {pieces:,} pieces"):
            given = train_tokenizer(compress(texts, ~valid), pieces)
    assert given is not None
    spelled_out = special_tokens(given).search
    clean = np.fromiter((spelled_out(text) is None for text in texts), bool, len(texts))
    dropped["special token"] = int(np.count_nonzero(~clean))
    texts, valid = list(compress(texts, clean)), valid[clean]

    tokens, lengths = _tokenize(given, texts)
    starts = np.cumsum(lengths) - lengths
    unique_lengths = np.bincount(np.minimum(lengths, LONGEST_COUNTED))
    too_long = lengths > max_length
    if overflow == "truncate":
        lengths = np.minimum(lengths, max_length)
        tokens[(starts + lengths - 1)[too_long]] = given.eos_token_id
        keep = np.ones(len(lengths), bool)
    else:
        dropped["too long"] = int(np.count_nonzero(too_long))
        keep = ~too_long
    chosen = {"train": keep & ~valid, "valid": keep & valid}
    if not chosen["train"].any():
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        raise UserError(f"{corpus.name} has no text to train on: {read} read ({why or 'empty'})")

    dtype: Literal["uint16", "uint32"] = "uint16" if len(given) <= 2**16 - 1 else "uint32"
    splits: dict[str, Split] = {}
    shards: list[Shard] = []
    tables: list[np.ndarray] = []
    with _new_folder(out) as folder, stage("packed the sequences") as advance:
        for split, mask in chosen.items():
            if not mask.any():
                continue
            totals, its_shards, table = write_split(
                folder,
                split,
                tokens,
                starts[mask],
                lengths[mask],
                seed=seed,
                dtype=dtype,
                block_size=block_size,
                shard_size=shard_size,
            )
            table["shard"] += len(shards)
            splits[split] = totals
            shards += its_shards
            tables.append(table)
            advance(totals.sequences)
        given.save_pretrained(folder / "tokenizer")
        np.save(folder / "blocks.npy", np.concatenate(tables))
        index = Index(
            dtype=dtype,
            block_size=block_size,
            max_length=max_length,
            vocab_size=len(given),
            pad_id=given.pad_token_id,
            eos_id=given.eos_token_id,
            tokenizer_fingerprint=fingerprint(given),
            splits=splits,
            shards=shards,
            blocks_sha256=hashlib.sha256((folder / "blocks.npy").read_bytes()).hexdigest(),
            texts_read=read,
            dropped=dropped,
            overlong=int(np.count_nonzero(too_long)),
            unique_lengths=unique_lengths.tolist(),
            recipe=recipe,
            path=str(folder),
            sha256="",
        )
        (folder / "index.json").write_text(index.model_dump_json(indent=1) + "\n")
    return open_index(out)


def _check(max_length: int, valid_fraction: float, overflow: str, block_size: int) -> None:
    if not 2 <= max_length < 2**16:
        raise UserError(
            f"max_length {max_length}: choose 2 to 65,535 tokens, the end token counted"
        )
    if not 0 <= valid_fraction < 1:
        raise UserError(f"valid_fraction {valid_fraction}: choose a share from 0 to below 1")
    if overflow not in ("drop", "truncate"):
        raise UserError(f"overflow {overflow!r}: choose drop or truncate")
    if block_size < 1 or block_size % CHUNK:
        raise UserError(f"block_size {block_size}: choose a multiple of {CHUNK}")


def _already_built(out: Path, recipe: dict[str, Any]) -> Index:
    if not (out / "index.json").is_file():
        raise UserError(f"{out} exists and is no dataset: choose another folder (--out)")
    index = open_index(out)
    for name, value in recipe.items():
        there = index.recipe.get(name)
        if there != value:
            what = "another input" if name == "sha256" else f"{name} {there}, not {value}"
            raise UserError(f"{out} was built with {what}: choose another --out or remove it")
    say(f"already built: {out}")
    return index


def _read(corpus: Corpus, dedupe: bool) -> tuple[list[str], np.ndarray, dict[str, int]]:
    """Texts, their uint64 hashes, and what was left out by reason."""
    texts: list[str] = []
    with stage("read the corpus") as advance:
        for batch in corpus:
            texts += batch
            advance(len(batch))
    dropped = dict(corpus.skipped)
    hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, map(str.encode, texts)), np.uint64)
    if dedupe:
        first = np.sort(np.unique(hashes, return_index=True)[1])
        dropped["duplicate"] = len(texts) - len(first)
        texts, hashes = [texts[i] for i in first.tolist()], hashes[first]
    return texts, hashes, dropped


def _tokenize(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    tokens, lengths = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
    with stage("tokenized the texts", total=len(texts)) as advance:
        for start in range(0, len(texts), BATCH):
            batch = encode(tokenizer, texts[start : start + BATCH])
            tokens.append(batch[0])
            lengths.append(batch[1])
            advance(len(batch[1]))
    return np.concatenate(tokens), np.concatenate(lengths)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that appears at `out` whole and on disk, or not at all."""
    folder = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        for path in [*folder.rglob("*"), folder]:
            _fsync(path)
        os.rename(folder, out)
        _fsync(out.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left for {out}: free some or choose another --out") from None
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UserError(f"{out} appeared while it was being built: run again") from None
        raise UserError(f"cannot write {out}: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
