"""The index of a dataset folder: what it holds, how it was made, and where each block lies.

- index.json: the model below, with totals, recipe and shards;
- blocks.npy: BLOCK [blocks], where each block's two arrays lie in which shard;
- tokenizer/: the tokenizer itself;
- train-00000.tar, valid-00000.tar ...: the shards.
"""

import hashlib
import json
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from shards.format.blocks import BLOCK, CHUNKS, SLACK, BlockReader, fit, read_table
from shards.format.tokenizers import fingerprint, load_tokenizer
from shards.storage.cache import Cache
from shards.storage.kinds import open_store
from shards.storage.store import INDEX, Manifest, Store, unreadable
from t5vae.common.errors import DamageError, UserError
from t5vae.common.storage import patiently

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 2
MOST_TABLE = 2**30  # bytes of blocks.npy
OVERFLOWS = ("drop", "truncate", "split")
HOW_TO_BUILD = "build it with: t5vae shards build SOURCE --out {path} --tokenizer T --max-length N"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


# An index may come from a stranger: sums stay within 64 bits, what is printed is one line.
Count = Annotated[int, Field(ge=0, le=2**48)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=200)]
Reason = Annotated[str, Field(pattern=r"^[\w ]+$", max_length=200)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Histogram = Annotated[list[Count], Field(max_length=2**16)]


class Shard(_Frozen):
    """One tar file."""

    name: Annotated[Name, Field(pattern=r"^\w[\w.-]*\.tar$")]
    split: Name
    bytes: Count
    sha256: Sha256
    blocks: Count
    sequences: Count
    tokens: Count


class Split(_Frozen):
    """The totals of one split; tokens count the end tokens."""

    sequences: Annotated[Count, Field(ge=1)]
    tokens: Count
    blocks: Count
    length_histogram: Histogram  # [length] -> number of sequences


class Altered(_Frozen):
    """What a tokenizer does not give back: of texts, and of pieces of those that were cut."""

    encoded: Annotated[Count, Field(ge=1)]  # texts
    altered: Count  # of them, those whose ids decode to another text
    characters: Annotated[
        dict[str, Count], Field(max_length=100)
    ]  # the commonest that are lost, and how often


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
    block_size: Id
    max_length: Annotated[int, Field(ge=2, lt=2**16)]
    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    pad_id: Id
    eos_id: Id
    tokenizer_fingerprint: Sha256
    splits: Annotated[dict[Name, Split], Field(max_length=100)]
    shards: list[Shard]
    blocks_sha256: Sha256
    texts_read: Count
    dropped: Annotated[dict[Reason, Count], Field(max_length=100)]
    overlong: Count
    unique_lengths: Histogram
    recipe: Annotated[dict[str, str | int | float | bool | None], Field(max_length=100)]
    altered: Altered | None = None

    path: str = Field(exclude=True)
    sha256: str = Field(exclude=True)
    _cache: Cache | None = PrivateAttr(None)
    _readers: dict[str, BlockReader] = PrivateAttr(default_factory=dict)

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
        """BLOCK [blocks] of all shards in order, not to be written to.

        Raises:
            DamageError: blocks.npy is missing or not the one the index names, or they contradict
                each other.
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
        try:
            table = read_table(content)
        except ValueError:
            table = np.empty(0, BLOCK)
        if wrong := self._wrong_totals(table):
            raise DamageError(f"{self.path}/index.json: {wrong}")
        sizes = [shard.bytes for shard in self.shards]
        if not fit(table, sizes, self.block_size, self.max_length, self.dtype) or not all(
            self._is_cut_evenly(table, split) for split in self.splits
        ):
            raise DamageError(f"{file} does not fit the index: build the dataset again")
        return table

    def _try_blocks(self) -> bytes:
        most = min(MOST_TABLE, BLOCK.itemsize * sum(s.blocks for s in self.shards) + SLACK)
        content = self.store.get("blocks.npy", most)
        if not self._is_blocks(content) and self.store.forget("blocks.npy"):
            content = self.store.get("blocks.npy", most)
        return content

    def _is_cut_evenly(self, table: np.ndarray, split: str) -> bool:
        """Whether all blocks of a split but the last are full."""
        full = table["sequences"][self._is_of(table, split)][:-1]
        return not len(full) or bool(
            self.block_size % CHUNKS == 0 and full.min() == self.block_size
        )

    def _wrong_totals(self, table: np.ndarray) -> str:
        """Which totals are not those of the blocks, if any."""
        bounds = np.searchsorted(table["shard"], range(len(self.shards) + 1))
        sums = {
            name: np.diff(np.concatenate([[0], np.cumsum(column, dtype=np.int64)])[bounds]).tolist()
            for name, column in (("sequences", table["sequences"]), ("tokens", table["tokens"]))
        }
        found = zip(np.diff(bounds).tolist(), *sums.values(), strict=True)
        for shard, totals in zip(self.shards, found, strict=True):
            if totals != (shard.blocks, shard.sequences, shard.tokens):
                return f"the totals of {shard.name} are wrong"
        for name, split in self.splits.items():
            own = [shard for shard in self.shards if shard.split == name]
            for what in ("blocks", "sequences", "tokens"):
                if sum(getattr(shard, what) for shard in own) != getattr(split, what):
                    return f"the totals of split {name} are wrong"
            counts = enumerate(split.length_histogram)
            products = [(count, length * count) for length, count in counts]
            if tuple(map(sum, zip(*products, strict=True))) != (split.sequences, split.tokens):
                return f"the length histogram of split {name} is wrong"
        return ""

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
        return self.blocks[self._is_of(self.blocks, split)]

    def _is_of(self, table: np.ndarray, split: str) -> np.ndarray:
        shards = np.array([shard.split == split for shard in self.shards])
        return shards[table["shard"]]

    def reader(self, split: str) -> BlockReader:
        """The reader of a split's blocks."""
        if split not in self._readers:
            names = [shard.name for shard in self.shards]
            self._readers[split] = BlockReader(
                self.store,
                self.path,
                names,
                self.split_blocks(split),
                self.dtype,
                self.max_length,
                self.vocab_size,
            )
        return self._readers[split]

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
            DamageError: it is of another size, or has other special tokens.
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
        tokenizer = load_tokenizer(folder, inside=folder.parent)
        ids = (len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
        if ids != (self.vocab_size, self.pad_id, self.eos_id):
            raise DamageError(
                f"{name} and index.json differ in the size of the vocabulary or its special tokens"
                if fingerprint(tokenizer) == self.tokenizer_fingerprint
                else f"{name} is not the tokenizer the dataset was built with"
            )
        return tokenizer

    def _contradiction(self) -> str:
        """What its fields say against each other, if anything."""
        for name in ("block_size", "max_length"):
            here = getattr(self, name)
            if (self.recipe.get(name) or here) != here:
                return f"{name} is {here}, but {self.recipe[name]!r} in the recipe"
        texts = (self.recipe.get("tokenizer"), self.recipe.get("sha256"))
        if self.recipe.get("overflow") not in OVERFLOWS or not all(
            isinstance(text, str) and text.isprintable() for text in texts
        ):
            return "its recipe is none"
        if "train" not in self.splits or not {shard.split for shard in self.shards} <= {
            *self.splits
        }:
            return "its splits are not those of its shards"
        if not sum(self.unique_lengths):
            return "it counts no texts"
        if max(self.pad_id, self.eos_id) >= min(self.vocab_size, np.iinfo(self.dtype).max + 1):
            return "its special tokens are beyond its vocabulary"
        return ""


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
    file = f"{location}/{INDEX}"
    how_to_build = HOW_TO_BUILD.format(path="FOLDER" if "://" in location else location)
    try:
        content = patiently(partial(open_store(location, cache=cache).get, INDEX), file)
    except FileNotFoundError:
        raise UserError(
            f"{location} is no dataset (it has no index.json): {how_to_build}"
        ) from None
    except OSError as error:
        raise unreadable(file, error) from None
    try:
        fields = json.loads(content, parse_constant=_refuse)
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"{file} has format version {version}, this program reads {FORMAT_VERSION}: "
                f"remove {location} and build it again"
            )
        digest = hashlib.sha256(content).hexdigest()
        index = Index.model_validate({**fields, "path": location, "sha256": digest})
    except (ValueError, KeyError, TypeError, RecursionError):  # pydantic's are ValueErrors
        raise DamageError(
            f"{file} is not a dataset's index or is damaged: {how_to_build}"
        ) from None
    if wrong := index._contradiction():
        raise DamageError(f"{file}: {wrong}")
    index._cache = cache
    return index


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")
