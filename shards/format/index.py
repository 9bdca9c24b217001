"""The index of a dataset folder: what it holds, how it was made, and where each block lies.

- index.json: the model below, with totals, recipe and shards;
- blocks.npy: BLOCK [blocks], where each block's two arrays lie in which shard;
- tokenizer/: the tokenizer itself;
- train-00000.tar, valid-00000.tar ...: the shards.
"""

import hashlib
import io
import json
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from shards.format.blocks import BlockReader
from shards.format.tokenizers import load_tokenizer
from shards.storage.cache import Cache
from shards.storage.kinds import open_store
from shards.storage.store import Manifest, Store, unreadable
from t5vae.common.errors import DamageError, UserError
from t5vae.common.storage import patiently

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 2
HOW_TO_BUILD = "build it with: t5vae shards build SOURCE --out {path} --tokenizer T --max-length N"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Frozen):
    """One tar file."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
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


class Altered(_Frozen):
    """What a tokenizer does not give back: of texts, and of pieces of those that were cut."""

    encoded: int  # texts
    altered: int  # of them, those whose ids decode to another text
    characters: dict[str, int]  # the commonest that are lost, and how often


class Index(_Frozen):
    """What a dataset folder holds.

    `unique_lengths` counts the unique texts by length before any was dropped, truncated or split
    for it (the last entry: that length or more); `overlong` counts those beyond max_length.
    `dropped` counts by reason what was read and not kept. `recipe` is the build's input, by
    content, and its options. `altered` is None where every text comes back from its ids. `path` is
    the folder or URL as it was given.
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
    altered: Altered | None = None

    path: str = Field(exclude=True)
    sha256: str = Field(exclude=True)
    _cache: Cache | None = PrivateAttr(None)

    def share_within(self, max_length: int) -> float:
        """The share of the corpus's unique texts that have at most max_length tokens."""
        return sum(self.unique_lengths[: max_length + 1]) / sum(self.unique_lengths)

    @cached_property
    def store(self) -> Store:
        """The dataset's files."""
        sha256 = {shard.name: shard.sha256 for shard in self.shards}
        manifest = Manifest(self.sha256, sha256 | {"blocks.npy": self.blocks_sha256})
        return open_store(self.path, manifest, self._cache)

    @cached_property
    def blocks(self) -> np.ndarray:
        """BLOCK [blocks] of all shards in order.

        Raises:
            DamageError: blocks.npy is missing or not the one the index names.
            StorageError: the storage failed for minutes.
            UserError: it may not be read.
        """
        file = f"{self.path}/blocks.npy"
        try:
            content = patiently(self._try_blocks, file)
        except FileNotFoundError:
            content = b""
        except OSError as error:
            raise unreadable(file, error) from None
        if not self._is_blocks(content):
            raise DamageError(f"{file} is missing or damaged: build the dataset again")
        return np.load(io.BytesIO(content))

    def _try_blocks(self) -> bytes:
        content = self.store.get("blocks.npy")
        if not self._is_blocks(content) and self.store.forget("blocks.npy"):
            content = self.store.get("blocks.npy")
        return content

    def _is_blocks(self, content: bytes) -> bool:
        return hashlib.sha256(content).hexdigest() == self.blocks_sha256

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

    def reader(self, split: str) -> BlockReader:
        """The reader of a split's blocks."""
        names = [shard.name for shard in self.shards]
        return BlockReader(self.store, self.path, names, self.split_blocks(split), self.dtype)

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
            StorageError: the storage failed for minutes.
            UserError: a block may not be read.
        """
        numbers = np.asarray(numbers, np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.sequences(split):
            raise IndexError(f"{split} has sequences 0 to {self.sequences(split) - 1}")
        return self.reader(split).sequences(numbers, self.max_length, self.pad_id)

    def texts(self, split: str, numbers: np.ndarray) -> list[str]:
        """The same sequences, decoded with the dataset's own tokenizer."""
        ids, _ = self.read(split, numbers)
        return self.tokenizer().batch_decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def as_json(self) -> str:
        """What index.json holds."""
        unsaid = None if self.altered else {"altered"}
        return self.model_dump_json(indent=1, exclude=unsaid) + "\n"

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the dataset's own tokenizer.

        Raises:
            UserError: it cannot be read or loaded.
            StorageError: the storage failed for minutes.
        """
        name = f"{self.path}/tokenizer"
        try:
            folder = patiently(partial(self.store.folder, "tokenizer"), name)
        except FileNotFoundError as error:
            raise UserError(f"cannot load the tokenizer of {self.path}: {error.strerror}") from None
        except OSError as error:
            raise unreadable(name, error) from None
        return load_tokenizer(folder)


def open_index(path: str | Path, cache: Cache | None = None) -> Index:
    """Open a dataset.

    Args:
        path: its folder, or a URL of any protocol that fsspec knows.
        cache: where copies of a URL's files are kept; by default `shards.storage.cache.Cache()`.

    Raises:
        UserError: there is no dataset, or one this version cannot read.
        DamageError: its index.json is not one.
        StorageError: the storage failed for minutes.
    """
    location = str(path)
    file = f"{location}/index.json"
    how_to_build = HOW_TO_BUILD.format(path="FOLDER" if "://" in location else location)
    try:
        content = patiently(partial(open_store(location).get, "index.json"), file)
    except FileNotFoundError:
        raise UserError(
            f"{location} is no dataset (it has no index.json): {how_to_build}"
        ) from None
    except OSError as error:
        raise unreadable(file, error) from None
    try:
        fields = json.loads(content)
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"{file} has format version {version}, this program reads {FORMAT_VERSION}: "
                f"remove {location} and build it again"
            )
        digest = hashlib.sha256(content).hexdigest()
        index = Index.model_validate({**fields, "path": location, "sha256": digest})
    except (ValueError, KeyError, TypeError):  # pydantic's ValidationError is a ValueError
        raise DamageError(
            f"{file} is not a dataset's index or is damaged: {how_to_build}"
        ) from None
    index._cache = cache
    return index
