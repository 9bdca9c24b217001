"""Build a dataset: read, drop duplicates, shuffle, split, tokenize, pack.

Everything passes through files in a work folder, sorted by keys (`shards.write.spool`), so that
memory does not grow with the corpus, tasks go to any number of processes, and a build that was
halted goes on. What comes out depends on the input and the options alone.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.format.index import Altered, Index, open_index
from shards.format.tokenizers import (
    fingerprint,
    load_tokenizer,
    pieces_to_train,
    train_tokenizer,
)
from shards.read.orders import CHUNK
from shards.write.corpora import Corpus, combine
from shards.write.encoders import LONG, TextEncoder, TokenEncoder, make_encoder
from shards.write.halted import forget, is_of_use, take_up
from shards.write.pack import write_splits
from shards.write.spool import Spool, open_spool
from shards.write.stages import (
    EQUAL,
    EQUAL_IDS,
    EQUAL_PIECES,
    Cut,
    Encode,
    Read,
    Tokenize,
    group_files,
    in_valid,
)
from shards.write.streams import copy_pipe, is_pipe
from shards.write.workers import Counts, carry_out
from t5vae.common.errors import UserError
from t5vae.common.files import fsync
from t5vae.common.progress import say, stage
from t5vae.common.storage import patiently
from t5vae.common.workfolder import work_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_BYTES = 128 * 2**20  # of text that a tokenizer is trained on
LONGEST_PIECE = 16  # bytes, of most tokenizers' pieces
LARGEST_BLOCK, BLOCK_TOKENS = 4096, 2**18
SHOWN_BAD_ROWS, SHOWN_CHARACTERS = 100, 20
WORK_VERSION = 2  # of what lies in a work folder

Dtype = Literal["uint16", "uint32"]
Overflow = Literal["drop", "truncate", "split"]
BadRows = Literal["error", "skip"]


def build(
    source: str | Path | None,
    out: str | Path,
    *,
    tokenizer: str | Path,
    max_length: int,
    format: str | None = None,
    column: str | None = None,
    bad_rows: BadRows = "error",
    valid_fraction: float = 0.02,
    overflow: Overflow = "drop",
    dedupe: bool = True,
    seed: int = 0,
    workers: int = 1,
    block_size: int | None = None,
    shard_size: int = 256 * 2**20,
) -> Index:
    """Build a dataset folder from a corpus; the same input and options give the same bytes.

    A sequence's split depends on the text that its ids decode to alone, so that a grown corpus
    moves none to the other split, nor does a tokenizer that gives every text back.
    What is done is kept in a folder `.NAME.build` beside `out`: the same call goes on where one
    was halted. A folder already built from the same input with the same options is left as it is.

    Args:
        source, format, column: the corpus, see `shards.write.corpora.Corpus`; the source "-" is
            standard input, and any pipe is read once.
        bad_rows: what a row does that is none, such as one with more cells than the header: "error"
            ends the build, "skip" leaves it out, names and counts it.
        out: the dataset folder to make.
        tokenizer: a Hugging Face name, a folder, "byte", or "train:N" (byte-level BPE of N pieces,
            trained on up to 128 MiB of the train split).
        max_length: the most tokens a sequence may have, its end token counted.
        valid_fraction: share of texts held out as the split "valid".
        overflow: what becomes of longer sequences: "drop", "truncate" (keep the beginning) or
            "split" (into sequences that fit).
        dedupe: keep one of equal texts, and of texts that a tokenizer takes for equal.
        seed: of the shuffle.
        workers: processes to work in; 1 is this one. More are started anew, so a script that asks
            for them does so under `if __name__ == "__main__":`.
        block_size: sequences in a block, a multiple of 16; by default 4096, or the smaller power of
            two with which a block holds up to 2^18 tokens on average.
        shard_size: bytes after which a shard is closed.

    Returns:
        The index of the dataset.

    Raises:
        UserError: bad input or options, nothing left to train on, a folder that holds something
            else, another process that builds it, or no space left on the disk.
        StorageError: files could not be read or written for minutes.
    """
    if "://" in str(out):
        raise UserError(f"{out} is no folder of this machine: build in one (--out), then copy it")
    out = Path(out)
    if not out.name:
        raise UserError(f"{out} has no name: choose another folder (--out)")
    options = _Options(max_length, valid_fraction, overflow, dedupe, seed, block_size, shard_size)
    options.check()
    pieces = pieces_to_train(str(tokenizer))
    given = load_tokenizer(tokenizer) if pieces is None else None
    if bad_rows not in get_args(BadRows):
        raise UserError(f"bad_rows {bad_rows!r}: choose error or skip")
    piped = source is not None and is_pipe(source)
    if piped and column is not None and format is None:
        raise UserError("a pipe has no name that tells its format: give --format with --column")
    corpus = None if piped else Corpus(source, format, column)
    with work_folder(out, is_of_use) as work:
        if corpus is None:
            assert source is not None
            corpus = Corpus(copy_pipe(source, work), format, column, name="-")
        if format is None and corpus.format_name != "text":
            say(f"{corpus.name} is read as {corpus.format_name}, by its name")
        if pieces and corpus.kind == "tokens":
            raise UserError(f"{corpus.name} holds token ids: give --tokenizer what they are of")
        recipe = {
            **corpus.describe(),
            "tokenizer": str(tokenizer) if given is None else fingerprint(given),
            **asdict(options),
            **({"bad_rows": bad_rows} if bad_rows != "error" else {}),
        }
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            return _already_built(out, corpus, recipe)
        files = [corpus.sha256()] if piped else [astuple(file) for file in corpus.files]
        parts, folder = work / "parts", work / "dataset"
        take_up(parts, {"version": WORK_VERSION, **recipe, "input": files}, corpus.kind)
        _build(folder, parts, corpus, recipe, options, given, pieces, workers)
        os.rename(folder, out.resolve())
        fsync(out.resolve().parent)
        forget(parts)
    return open_index(out)


@dataclass(frozen=True)
class _Options:
    max_length: int
    valid_fraction: float
    overflow: Overflow
    dedupe: bool
    seed: int
    block_size: int | None
    shard_size: int

    def check(self) -> None:
        if not 2 <= self.max_length < 2**16:
            raise UserError(
                f"max_length {self.max_length}: choose 2 to 65,535 tokens, the end token counted"
            )
        if not 0 <= self.valid_fraction < 1:
            raise UserError(
                f"valid_fraction {self.valid_fraction}: choose a share from 0 to below 1"
            )
        if self.overflow not in get_args(Overflow):
            raise UserError(f"overflow {self.overflow!r}: choose drop, truncate or split")
        if self.block_size is not None and (self.block_size < 1 or self.block_size % CHUNK):
            raise UserError(f"block_size {self.block_size}: choose a multiple of {CHUNK}")


def _already_built(out: Path, corpus: Corpus, recipe: dict[str, Any]) -> Index:
    if not (out / "index.json").is_file():
        raise UserError(f"{out} exists and is no dataset: choose another folder (--out)")
    index = open_index(out)
    here, before = ({"bad_rows": "error"} | each for each in (recipe, index.recipe))
    another = [name for name, value in here.items() if before.get(name) != value]
    if not another and index.recipe["sha256"] != corpus.sha256():
        another = ["bytes"]
    for name in another:
        there = f"{name} {before.get(name)}, not {here[name]}"
        what = "another input" if name in ("files", "bytes") else there
        raise UserError(f"{out} was built with {what}: choose another --out or remove it")
    say(f"already built: {out}")
    return index


def _build(
    folder: Path,
    parts: Path,
    corpus: Corpus,
    recipe: dict[str, Any],
    options: _Options,
    given: "PreTrainedTokenizerBase | None",
    pieces: int | None,
    workers: int,
) -> None:
    """Make the dataset in `folder`; what is done on the way there lies in `parts`."""
    kind, seed, dedupe = corpus.kind, options.seed, options.dedupe
    groups = group_files(corpus.files)
    of_tokens = TokenEncoder.of(given) if given and kind == "tokens" else None
    bad_rows = recipe.get("bad_rows", "error")
    reading = Read(
        parts / "read", groups, corpus.format, corpus.column, bad_rows, seed, dedupe, of_tokens
    )
    read = carry_out(reading, workers)
    _say_bad_rows([line for done in read for line in done["bad_rows"]])
    spool = open_spool(reading.folder, [done["spool"] for done in read], kind, dedupe)
    tokenizer = _tokenizer(parts / "tokenizer", given, pieces, spool, options)
    encoder = make_encoder(tokenizer, kind)

    cut: list[Counts] = []
    if options.overflow != "drop":
        keep = 1 if options.overflow == "truncate" else None
        cutting = Cut(parts / "cut", spool, encoder, options.max_length, seed, keep)
        cut = carry_out(cutting, workers)
        spool.remove()
        spool = open_spool(cutting.folder, [done["spool"] for done in cut], kind, dedupe)

    encoded: list[Counts] = []
    if isinstance(encoder, TextEncoder) and not encoder.lossless:
        encoding = Encode(parts / "encoded", spool, encoder, options.max_length, seed)
        encoded = carry_out(encoding, workers)
        spool.remove()
        spool = open_spool(encoding.folder, [done["spool"] for done in encoded], "tokens", dedupe)
        encoder = TokenEncoder.of(tokenizer)

    dtype: Dtype = "uint16" if len(tokenizer) <= 2**16 - 1 else "uint32"
    tokenizing = Tokenize(
        parts / "tokens",
        spool,
        encoder,
        options.max_length,
        options.valid_fraction,
        dtype,
        equal=EQUAL_IDS if encoded else EQUAL_PIECES if cut else EQUAL,
    )
    tokenized = carry_out(tokenizing, workers)
    spool.remove()

    tally = _tally(read, cut, encoded, tokenized)
    sequences = _sum(done["sequences"] for done in tokenized)
    if not sequences["train"]:
        why = ", ".join(f"{count} {reason}" for reason, count in tally["dropped"].items())
        if held_out := sequences["valid"]:
            why = f"{held_out} held out: lower --valid-fraction, to 0 for none"
        forget(parts)  # other texts or options are read anew
        raise UserError(
            f"{corpus.name} has no text to train on: {tally['texts_read']} read ({why or 'empty'})"
        )
    block_size = options.block_size or _block_size(tokenized)

    def pack() -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)
        shutil.copytree(parts / "tokenizer", folder / "tokenizer")
        splits, shards, blocks = write_splits(
            folder,
            tokenizing.folder,
            [done["sequences"] for done in tokenized],
            block_size=block_size,
            shard_size=options.shard_size,
        )
        np.save(folder / "blocks.npy", blocks)
        index = Index(
            dtype=dtype,
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
            recipe=recipe | {"sha256": combine(d for done in read for d in done["digests"])},
            path=str(folder),
            sha256="",
        )
        (folder / "index.json").write_text(index.as_json())
        for path in [*folder.rglob("*"), folder]:
            fsync(path)

    patiently(pack, str(folder))


def _block_size(tokenized: list[Counts]) -> int:
    """Blocks that a reader can hold hundreds of, however long the sequences are."""
    sequences = sum(sum(done["sequences"].values()) for done in tokenized)
    tokens = sum(done["tokens"] for done in tokenized)
    fitting = BLOCK_TOKENS * sequences // tokens
    return min(LARGEST_BLOCK, max(CHUNK, 2 ** (fitting.bit_length() - 1)))


def _say_bad_rows(lines: list[str]) -> None:
    for line in lines[:SHOWN_BAD_ROWS]:
        say(f"left out: {line}")
    if len(lines) > SHOWN_BAD_ROWS:
        say(f"left out: {len(lines) - SHOWN_BAD_ROWS:,} bad rows more")


def _sum(counts: Iterable[dict[str, int]]) -> Counter[str]:
    return sum(map(Counter, counts), Counter())


def _tally(
    read: list[Counts], cut: list[Counts], encoded: list[Counts], tokenized: list[Counts]
) -> dict[str, Any]:
    """The fields of the index that the stages counted."""
    stages = (*read, *cut, *encoded, *tokenized)
    dropped = _sum(done["dropped"] for done in stages)
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
    lost = _sum(done["lost"] for done in encoded)
    return Altered(
        encoded=sum(done["encoded"] for done in encoded),
        altered=altered,
        characters=dict(lost.most_common(SHOWN_CHARACTERS)),
    )


def _tokenizer(
    folder: Path,
    given: "PreTrainedTokenizerBase | None",
    pieces: int | None,
    spool: Spool,
    options: _Options,
) -> "PreTrainedTokenizerBase":
    """The tokenizer: given, trained before, or trained now; saved in a folder."""
    if folder.exists():
        return load_tokenizer(folder) if given is None else given
    if pieces is not None:
        with stage(f"trained a tokenizer of {pieces:,} pieces"):
            given = train_tokenizer(_sample(spool, options), pieces)
    assert given is not None
    saved = folder.with_name("tokenizer.part")
    given.save_pretrained(saved)
    os.rename(saved, folder)
    return given


def _sample(spool: Spool, options: _Options) -> Iterator[str]:
    """The texts of the train split that have the lowest keys: a random sample."""
    left = SAMPLE_BYTES
    longest = max(LONG, LONGEST_PIECE * options.max_length)
    for number in range(spool.buckets):
        items, hashes, _ = spool.bucket(number)
        items = items.filter(pa.array(~in_valid(hashes, options.valid_fraction)))
        if options.overflow == "drop":
            items = items.filter(pc.less_equal(pc.binary_length(items), longest))
        ends = np.cumsum(pc.binary_length(items))
        fitting = int(np.searchsorted(ends, left, side="right"))
        for text in items[:fitting].to_pylist():
            end = longest if options.overflow == "truncate" else len(text)
            yield from (text[start : start + LONG] for start in range(0, min(end, len(text)), LONG))
        if fitting < len(items):
            return
        left -= int(ends[-1]) if len(ends) else 0
