"""The index of a dataset folder: what it holds, how it was made, and where each block lies.

- index.json: the model below, with totals, recipe and shards;
- blocks.npy: BLOCK [blocks], where each block's two arrays lie in which shard;
- tokenizer/: the tokenizer itself;
- train-00000.tar, valid-00000.tar ...: the shards.
"""

import hashlib
import io
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from shards.errors import DamageError, UserError
from shards.store import Store, open_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 2
HOW_TO_BUILD = "build it with: t5vae shards build SOURCE --out {path} --tokenizer T --max-length N"

BLOCK = np.dtype(
    [
        ("shard", "<i4"),  # place in Index.shards
        ("lengths_offset", "<i8"),  # bytes from the shard's start to the array's data
        ("tokens_offset", "<i8"),
        ("sequences", "<i4"),
        ("tokens", "<i8"),
        ("crc32", "<u4"),  # of the lengths' bytes, then the tokens'
    ]
)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Frozen):
    """One tar file."""

    name: str
    split: str
    bytes: int
    sha256: str
    blocks: int
    sequences: int
    tokens: int


class Split(_Frozen):
    """The totals of one split; tokens count the end tokens."""

    sequences: int
    tokens: int
    blocks: int
    length_histogram: list[int]  # [length] -> number of sequences


class Index(_Frozen):
    """What a dataset folder holds.

    `unique_lengths` counts the unique texts by length before any was dropped, truncated or split
    for it (the last entry: that length or more); `overlong` counts those beyond max_length.
    `dropped` counts by reason what was read and not kept. `recipe` is the build's input, by
    content, and its options. `path` is the folder or URL as it was given.
    """

    format_version: int = FORMAT_VERSION
    dtype: Literal["uint16", "uint32"]
    block_size: int
    max_length: int
    vocab_size: int
    pad_id: int
    eos_id: int
    tokenizer_fingerprint: str
    splits: dict[str, Split]
    shards: list[Shard]
    blocks_sha256: str
    texts_read: int
    dropped: dict[str, int]
    overlong: int
    unique_lengths: list[int]
    recipe: dict[str, Any]

    path: str = Field(exclude=True)
    sha256: str = Field(exclude=True)

    def share_within(self, max_length: int) -> float:
        """The share of the corpus's unique texts that have at most max_length tokens."""
        return sum(self.unique_lengths[: max_length + 1]) / sum(self.unique_lengths)

    @cached_property
    def store(self) -> Store:
        """The dataset's files."""
        return open_store(self.path)

    @cached_property
    def blocks(self) -> np.ndarray:
        """BLOCK [blocks] of all shards in order.

        Raises:
            DamageError: blocks.npy is missing or not the one the index names.
        """
        try:
            content = self.store.get("blocks.npy")
        except FileNotFoundError:
            content = b""
        if hashlib.sha256(content).hexdigest() != self.blocks_sha256:
            raise DamageError(
                f"{self.path}/blocks.npy is missing or damaged: build the dataset again"
            )
        return np.load(io.BytesIO(content))

    def split(self, name: str) -> Split:
        """The totals of a split.

        Raises:
            UserError: no such split.
        """
        if name not in self.splits:
            has = ", ".join(self.splits)
            raise UserError(f"{self.path} has no split {name!r}; it has: {has}")
        return self.splits[name]

    def sequences(self, split: str) -> int:
        """How many sequences a split holds."""
        return self.split(split).sequences

    def split_blocks(self, split: str) -> np.ndarray:
        """BLOCK [blocks of the split]."""
        self.split(split)
        shards = [number for number, shard in enumerate(self.shards) if shard.split == split]
        return self.blocks[np.isin(self.blocks["shard"], shards)]

    def read(self, split: str, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sequences by number.

        Args:
            split: the split's name.
            numbers: int [n], each in 0 .. sequences(split) - 1.

        Returns:
            ids int64 [n, longest], padded with pad_id, and lengths int64 [n].

        Raises:
            IndexError: a number outside the split.
            DamageError: a block is not what the index says.
        """
        from shards.blocks import BlockReader

        numbers = np.asarray(numbers, np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.sequences(split):
            raise IndexError(f"{split} has sequences 0 to {self.sequences(split) - 1}")
        reader = BlockReader(self, split)
        block = np.searchsorted(reader.first, numbers, side="right") - 1
        ids, lengths, _ = reader.gather(block, numbers - reader.first[block])
        return ids, lengths

    def texts(self, split: str, numbers: np.ndarray) -> list[str]:
        """The same sequences, decoded with the dataset's own tokenizer."""
        ids, _ = self.read(split, numbers)
        return self.tokenizer().batch_decode(ids, skip_special_tokens=True)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the dataset's own tokenizer."""
        from shards.tokenizers import load_tokenizer

        return load_tokenizer(self.store.folder("tokenizer"))


def open_index(path: str | Path) -> Index:
    """Open a dataset folder.

    Args:
        path: a folder, or its URL.

    Raises:
        UserError: there is no dataset, or one this version cannot read.
        DamageError: its index.json is not one.
    """
    location = str(path)
    file = f"{location}/index.json"
    try:
        content = open_store(location).get("index.json")
    except FileNotFoundError:
        raise UserError(
            f"{location} is no dataset (it has no index.json): {HOW_TO_BUILD.format(path=location)}"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    try:
        fields = json.loads(content)
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"{file} has format version {version}, this program reads {FORMAT_VERSION}: "
                "build the dataset again"
            )
        digest = hashlib.sha256(content).hexdigest()
        return Index.model_validate({**fields, "path": location, "sha256": digest})
    except (ValueError, KeyError, TypeError):  # pydantic's ValidationError is a ValueError
        raise DamageError(
            f"{file} is not a dataset's index or is damaged: {HOW_TO_BUILD.format(path=location)}"
        ) from None
