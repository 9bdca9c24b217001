"""Build a dataset: read, drop duplicates, shuffle, split, tokenize, pack.

Everything passes through files in a work folder, sorted by keys (`shards.write.spool`), so that
memory does not grow with the corpus, tasks go to any number of processes, and a build that was
halted goes on. What comes out depends on the input and the options alone.
"""

import shutil
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, overload

from shards.format.index import Index, open_index
from shards.format.tokenizers import fingerprint, load_tokenizer, pieces_to_train
from shards.write.corpora import Corpus, File
from shards.write.encoders import TextEncoder, make_encoder
from shards.write.finish import finish
from shards.write.halted import forget, is_of_use, take_up
from shards.write.options import BadRows, Options, Overflow, Part, difference
from shards.write.parts import (
    finish_part,
    folder_of_parts,
    have_parts,
    join_parts,
    read_part,
    read_parts,
)
from shards.write.pipeline import Pipeline
from shards.write.stamps import is_unchanged, note_stamp
from shards.write.streams import copy_pipe, is_pipe
from t5vae.common.errors import UserError
from t5vae.common.progress import say
from t5vae.common.workfolder import work_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORK_VERSION = 3  # of what lies in a work folder


@overload
def build(
    source: str | Path | None, out: str | Path, *, part: None = None, **options: Any
) -> Index: ...


@overload
def build(
    source: str | Path | None, out: str | Path, *, part: tuple[int, int] | None, **options: Any
) -> Index | None: ...


def build(  # type: ignore[misc]
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
    part: tuple[int, int] | None = None,
) -> Index | None:
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
        part: (K, N), from 1 on: read the whole corpus, but make only part K of N, in a folder
            `.NAME.parts` beside `out`. Any process on any machine may make any part; `join` then
            makes the dataset, byte for byte the one of a build in one go.
        block_size: sequences in a block, a multiple of 16; by default 4096, or the smaller power of
            two with which a block holds up to 2^18 tokens on average.
        shard_size: bytes after which a shard is closed.

    Returns:
        The index of the dataset; None of a part.

    Raises:
        UserError: bad input or options, nothing left to train on, a folder that holds something
            else, another process that builds it, or no space left on the disk.
        StorageError: files could not be read or written for minutes.
    """
    out = _named(out)
    options = Options(max_length, valid_fraction, overflow, dedupe, seed, block_size, shard_size)
    options.check()
    pieces = pieces_to_train(str(tokenizer))
    given = load_tokenizer(tokenizer) if pieces is None else None
    if bad_rows not in get_args(BadRows):
        raise UserError(f"bad_rows {bad_rows!r}: choose error or skip")
    piped = source is not None and is_pipe(source)
    if piped and column is not None and format is None:
        raise UserError("a pipe has no name that tells its format: give --format with --column")
    corpus = None if piped else Corpus(source, format, column)
    of = None if part is None else _part(part, given, options, corpus)
    target = out if of is None else folder_of_parts(out) / str(of)
    with have_parts(out), work_folder(target, is_of_use) as work:
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
            return _already_built(out, corpus, recipe, piped)
        if of and (document := read_part(target)):
            _check_part(target, document, recipe, corpus.files)
            return None
        files = [corpus.sha256()] if piped else [astuple(file) for file in corpus.files]
        parts = work / "parts"
        whole = {"version": WORK_VERSION, **recipe, **({"part": astuple(of)} if of else {})}
        take_up(parts, whole | {"input": files}, corpus.kind)
        pipeline = Pipeline(parts, corpus.kind, options, workers)
        pipeline.read_corpus(corpus, bad_rows, given, *([of.span] if of else []))
        pipeline.prepare(given, pieces)
        if of:
            pipeline.stages()[0]()
            finish_part(pipeline, target, recipe, corpus.files)
            return None
        for stage in pipeline.stages():
            stage()
        finish(pipeline, work / "dataset", out, recipe, None if piped else corpus.files)
        forget(parts)
    return open_index(out)


def join(out: str | Path, *, workers: int = 1) -> Index:
    """Make the dataset of which all parts are built; they are removed.

    Args:
        out: as given to `build`.
        workers: processes to work in, as of `build`.

    Returns:
        The index of the dataset: the same bytes as of a build in one go.

    Raises:
        UserError, StorageError: as of `build`; also if parts are missing or do not go together.
    """
    out = _named(out)
    if (out / "index.json").is_file():
        say(f"already built: {out}")
        shutil.rmtree(folder_of_parts(out), ignore_errors=True)  # of a join halted at its very end
        return open_index(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is no dataset: choose another folder (--out)")
    there = read_parts(out)
    with work_folder(out, is_of_use) as work:
        first, document = there[0]
        folder, recipe = work / "parts", document["recipe"]
        made_from = {**recipe, "input": document["input"], "parts": len(there)}
        take_up(folder, {"version": WORK_VERSION, **made_from}, document["kind"])
        if not (folder / "tokenizer").exists():
            shutil.copytree(first / "tokenizer", folder / "tokenizer")
        pipeline = join_parts(folder, there, workers)
        pipeline.prepare(load_tokenizer(folder / "tokenizer"), None)
        for stage in pipeline.stages()[1:]:
            stage()
        files = [File(*file) for file in document["input"]]
        finish(pipeline, work / "dataset", out, recipe, files)
        forget(folder)
    shutil.rmtree(folder_of_parts(out))
    return open_index(out)


def _named(out: str | Path) -> Path:
    if "://" in str(out):
        raise UserError(f"{out} is no folder of this machine: build in one (--out), then copy it")
    out = Path(out)
    if not out.name:
        raise UserError(f"{out} has no name: choose another folder (--out)")
    return out


def _part(
    part: tuple[int, int],
    given: "PreTrainedTokenizerBase | None",
    options: Options,
    corpus: Corpus | None,
) -> Part:
    of = Part(*part)
    of.check()
    if corpus is None:
        raise UserError("a pipe is read once, and every part reads all: give --part a file")
    if given is None:
        raise UserError(
            "--part takes no train:N, since no part sees all texts: build a dataset from a sample "
            "with train:N, and give the folder tokenizer/ in it as --tokenizer"
        )
    encoder = make_encoder(given, corpus.kind)
    lossy = isinstance(encoder, TextEncoder) and not encoder.lossless
    if not options.dedupe and (lossy or options.overflow != "drop"):
        why = "a tokenizer that does not give all texts back" if lossy else "--overflow"
        raise UserError(
            f"--part with --no-dedupe and {why} would give another order: leave one out"
        )
    return of


def _already_built(out: Path, corpus: Corpus, recipe: dict[str, Any], piped: bool) -> Index:
    if not (out / "index.json").is_file():
        raise UserError(f"{out} exists and is no dataset: choose another folder (--out)")
    index = open_index(out)
    another = difference(index.recipe, recipe)
    if not another and (piped or not is_unchanged(out, corpus.files)):
        if index.recipe["sha256"] != corpus.sha256():
            another = "another input"
        elif not piped:
            note_stamp(out, corpus.files)
    if another:
        raise UserError(f"{out} was built with {another}: choose another --out or remove it")
    say(f"already built: {out}")
    return index


def _check_part(
    place: Path, document: dict[str, Any], recipe: dict[str, Any], files: list[File]
) -> None:
    before = document["recipe"] | {"input": document["input"]}
    if another := difference(before, recipe | {"input": [list(astuple(file)) for file in files]}):
        raise UserError(f"{place} was built with {another}: remove it, or choose another --out")
    say(f"already built: {place}")
