"""The stages of a build one after the other, and what each of them counted."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.format.tokenizers import load_tokenizer, train_tokenizer
from shards.write.corpora import Corpus
from shards.write.encoders import LONG, Encoder, TextEncoder, TokenEncoder, make_encoder
from shards.write.merge import merge
from shards.write.options import Options
from shards.write.spool import ALL, Span, Spool, open_spool
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
from shards.write.workers import Counts, carry_out
from t5vae.common.progress import say, stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_BYTES = 128 * 2**20  # of text that a tokenizer is trained on
LONGEST_PIECE = 16  # bytes, of most tokenizers' pieces
SHOWN_BAD_ROWS = 100

Dtype = Literal["uint16", "uint32"]


@dataclass
class Pipeline:
    """A corpus on its way to sequences, in a folder that has what each stage made.

    Attributes:
        read, cut, encoded, tokenized: the counts of the tasks of each stage.
        merged: duplicates that were left out between the stages, by reason.
        tokens: the files of `Tokenize`, in their order.
        keep: the runs of the spool that it begins with.
    """

    folder: Path
    kind: str
    options: Options
    workers: int
    read: list[Counts] = field(default_factory=list)
    cut: list[Counts] = field(default_factory=list)
    encoded: list[Counts] = field(default_factory=list)
    tokenized: list[Counts] = field(default_factory=list)
    merged: Counter[str] = field(default_factory=Counter)
    tokens: list[Path] = field(default_factory=list)
    keep: bool = False
    spool: Spool = field(init=False)
    tokenizer: "PreTrainedTokenizerBase" = field(init=False)
    encoder: Encoder = field(init=False)

    def read_corpus(
        self,
        corpus: Corpus,
        bad_rows: str,
        given: "PreTrainedTokenizerBase | None",
        span: Span = ALL,
    ) -> None:
        """Spool the corpus's items that have a key in `span`."""
        seed, dedupe = self.options.seed, self.options.dedupe
        of_tokens = TokenEncoder.of(given) if given and self.kind == "tokens" else None
        groups = group_files(corpus.files)
        folder = self.folder / "read"
        reading = Read(
            folder, groups, corpus.format, corpus.column, bad_rows, seed, dedupe, of_tokens, span
        )
        self.read = carry_out(reading, self.workers)
        _say_bad_rows([line for done in self.read for line in done["bad_rows"]])
        spools = [done["spool"] for done in self.read]
        self.take(open_spool(folder, spools, self.kind, dedupe, span), "read", EQUAL)

    def take(self, spool: Spool, name: str, reason: str) -> None:
        """Go on with a spool; `reason` is that of its duplicates."""
        self.spool, duplicates = merge(spool, self.folder / name, self.workers, keep=self.keep)
        self.merged[reason] += duplicates

    def prepare(self, given: "PreTrainedTokenizerBase | None", pieces: int | None) -> None:
        """Have the tokenizer, be it given or to be trained on what was read."""
        folder = self.folder / "tokenizer"
        self.tokenizer = _tokenizer(folder, given, pieces, self)
        self.encoder = make_encoder(self.tokenizer, self.kind)  # type: ignore[arg-type]

    def stages(self) -> list[Callable[[], None]]:
        """All there are, in their order. The last keeps the keys of items, others make new ones."""
        lossy = isinstance(self.encoder, TextEncoder) and not self.encoder.lossless
        cuts = self.options.overflow != "drop"
        return [self._cut] * cuts + [self._encode] * lossy + [self._tokenize]

    @property
    def equal(self) -> str:
        """The reason to leave out what equals another item of the spool."""
        return EQUAL_IDS if self.encoded else EQUAL_PIECES if self.cut else EQUAL

    @property
    def dtype(self) -> Dtype:
        """Of token ids on disk."""
        return "uint16" if len(self.tokenizer) <= 2**16 - 1 else "uint32"

    def _cut(self) -> None:
        options = self.options
        keep = 1 if options.overflow == "truncate" else None
        cutting = Cut(
            self.folder / "cut", self.spool, self.encoder, options.max_length, options.seed, keep
        )
        self.cut = carry_out(cutting, self.workers)
        self._respool(cutting.folder, self.cut, self.kind)

    def _encode(self) -> None:
        assert isinstance(self.encoder, TextEncoder)
        options = self.options
        encoding = Encode(
            self.folder / "encoded",
            self.spool,
            self.encoder,
            options.max_length,
            options.seed,
            self.equal,
        )
        self.encoded = carry_out(encoding, self.workers)
        self._respool(encoding.folder, self.encoded, "tokens")

    def _respool(self, folder: Path, done: list[Counts], kind: str) -> None:
        self.remove()
        spool = open_spool(folder, [counts["spool"] for counts in done], kind, self.options.dedupe)
        self.keep = False
        self.take(spool, folder.name, self.equal)

    def _tokenize(self) -> None:
        tokenizing = Tokenize(
            self.folder / "tokens",
            self.spool,
            TokenEncoder.of(self.tokenizer) if self.encoded else self.encoder,
            self.options.max_length,
            self.options.valid_fraction,
            self.dtype,
            self.equal,
        )
        self.tokenized = carry_out(tokenizing, self.workers)
        self.tokens = [tokenizing.folder / f"{task:05}.npz" for task in range(tokenizing.tasks)]
        self.remove()

    def remove(self) -> None:
        """Make room: the items of the spool have gone on."""
        if not self.keep:
            self.spool.remove()


def _say_bad_rows(lines: list[str]) -> None:
    for line in lines[:SHOWN_BAD_ROWS]:
        say(f"left out: {line}")
    if len(lines) > SHOWN_BAD_ROWS:
        say(f"left out: {len(lines) - SHOWN_BAD_ROWS:,} bad rows more")


def _tokenizer(
    folder: Path,
    given: "PreTrainedTokenizerBase | None",
    pieces: int | None,
    pipeline: Pipeline,
) -> "PreTrainedTokenizerBase":
    """The tokenizer: given, trained before, or trained now; saved in a folder."""
    if folder.exists():
        return load_tokenizer(folder) if given is None else given
    if pieces is not None:
        with stage(f"trained a tokenizer of {pieces:,} pieces"):
            given = train_tokenizer(_sample(pipeline.spool, pipeline.options), pieces)
    assert given is not None
    saved = folder.with_name("tokenizer.part")
    given.save_pretrained(saved)
    os.rename(saved, folder)
    return given


def _sample(spool: Spool, options: Options) -> Iterator[str]:
    """The texts of the train split that have the lowest keys: a random sample."""
    left = SAMPLE_BYTES
    longest = max(LONG, LONGEST_PIECE * options.max_length)
    for number in range(spool.buckets):
        items, hashes, _, _ = spool.bucket(number)
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
