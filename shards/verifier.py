"""Verify a dataset: every byte against the index."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shards.blocks import BlockReader
from shards.errors import DamageError, UserError
from shards.index import Index, open_index
from shards.tokenizers import fingerprint


@dataclass(frozen=True)
class Report:
    """What was checked and what is wrong; each problem names its file, and block where it can."""

    path: Path
    shards: int = 0
    blocks: int = 0
    sequences: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(path: str | Path) -> Report:
    """Check sizes, sha256, crc32, counts, token ids and the tokenizer of a dataset folder.

    Raises:
        UserError: there is no dataset.
    """
    try:
        index = open_index(path)
        blocks = len(index.blocks)
    except DamageError as error:
        return Report(Path(path), problems=[str(error)])
    problems = [*_shards(index), *_tokenizer(index)]
    for split in index.splits:
        problems += [*_blocks(index, split), *_totals(index, split)]
    sequences = sum(totals.sequences for totals in index.splits.values())
    return Report(Path(index.path), len(index.shards), blocks, sequences, problems)


def _shards(index: Index) -> Iterator[str]:
    for shard in index.shards:
        path = Path(index.path) / shard.name
        if not path.is_file():
            yield f"{path} is missing"
        elif (size := path.stat().st_size) != shard.bytes:
            yield f"{path} has {size:,} bytes instead of {shard.bytes:,}"
        else:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                    yield f"{path} is not what was written (its sha256 differs)"


def _blocks(index: Index, split: str) -> Iterator[str]:
    reader = BlockReader(index, split, keep=1)
    for number, entry in enumerate(reader.table):
        try:
            block = reader.block(number)
        except DamageError as error:
            yield str(error)
            continue
        lengths, tokens = block.lengths, block.tokens
        if lengths.sum() != entry["tokens"] or lengths.min() < 1:
            yield f"{reader.where(number)} has lengths that do not add up to its tokens"
        elif lengths.max() > index.max_length or tokens.max() >= index.vocab_size:
            yield f"{reader.where(number)} has sequences or token ids beyond the index's limits"
        elif np.any(tokens[block.starts + lengths - 1] != index.eos_id):
            yield f"{reader.where(number)} has sequences without an end token"


def _totals(index: Index, split: str) -> Iterator[str]:
    totals = index.splits[split]
    table = index.split_blocks(split)
    here = (len(table), int(table["sequences"].sum()), int(table["tokens"].sum()))
    if here != (totals.blocks, totals.sequences, totals.tokens):
        yield f"{Path(index.path) / 'index.json'}: the totals of split {split} are wrong"


def _tokenizer(index: Index) -> Iterator[str]:
    folder = Path(index.path) / "tokenizer"
    try:
        if fingerprint(index.tokenizer()) != index.tokenizer_fingerprint:
            yield f"{folder} is not the tokenizer the dataset was built with"
    except UserError as error:
        yield str(error)
