"""Encoders: texts to flat arrays of token ids, as a tokenizer has them."""

import json
import re
import sys
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

WORD = re.compile(r"\w")
LONG = 2**16  # characters: a single word of so many is still tokenized in some tenths of a second


class Encoder(Protocol):
    """Turns sequences into token ids; small and picklable, for use in other processes.

    An item is a text or, where the kind is "tokens", the bytes of a little-endian int32 array.
    """

    def most(self, max_length: int) -> int:
        """The size (`len`) beyond which an item is taken to have more than max_length tokens."""

    def encode(self, items: list) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize items, end tokens included.

        Returns:
            tokens: int32 [sum of lengths], all sequences one after the other.
            lengths: int64 [len(items)].
        """

    def usable(self, items: list) -> np.ndarray:
        """Which items make a sequence: bool [len(items)].

        Not texts that spell out a special or added token or leave no token but the end, and not
        ids outside the vocabulary or with a pad or end token amid others.
        """

    def cut(self, item: Any, max_length: int) -> Iterator:
        """Cut an item into items that have at most max_length tokens each, end token included.

        A text's pieces make up the text; only characters that do not fit by themselves are left
        out, which may leave no piece.
        """

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
        """The texts of sequences, as `encode` returns them, special tokens left out."""


def make_encoder(tokenizer: "PreTrainedTokenizerBase", kind: Literal["text", "tokens"]) -> Encoder:
    """The encoder of a tokenizer; its kind is a `Corpus`'s."""
    if kind == "tokens":
        return TokenEncoder.of(tokenizer)
    return make_text_encoder(tokenizer)


def make_text_encoder(tokenizer: "PreTrainedTokenizerBase") -> "TextEncoder":
    """The encoder of texts of a tokenizer."""
    from tokenizers import Tokenizer
    from transformers import ByT5Tokenizer

    # Those that are added and not special are pieces as any other.
    added = tokenizer.added_tokens_decoder.values()
    names = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    special = re.compile("|".join(map(re.escape, sorted(names))))
    if isinstance(tokenizer, ByT5Tokenizer):
        return ByteEncoder(special, longest_piece=1, lossless=True)
    longest = max(map(len, tokenizer.get_vocab()))
    if not tokenizer.is_fast:
        return SlowEncoder(special, longest, lossless=False, tokenizer=tokenizer)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return FastEncoder(special, longest, lossless=_is_lossless(backend), backend=backend)


def _is_lossless(backend: "Tokenizer") -> bool:
    """Whether every text is sure to come back from its ids: a byte-level BPE, as of GPT-2."""
    from tokenizers import pre_tokenizers

    parts = json.loads(backend.to_str())
    before, after = parts["pre_tokenizer"] or {}, parts["decoder"] or {}
    return (
        parts["model"]["type"] == "BPE"
        and parts["normalizer"] is None
        and (before.get("type"), before.get("add_prefix_space")) == ("ByteLevel", False)
        and after.get("type") == "ByteLevel"
        and set(pre_tokenizers.ByteLevel.alphabet()) <= set(parts["model"]["vocab"])
        and not any(t["lstrip"] or t["rstrip"] or t["normalized"] for t in parts["added_tokens"])
    )


@dataclass(frozen=True)
class TextEncoder(ABC):
    """What the encoders of texts have in common.

    Attributes:
        special: finds the special tokens spelled out in a text.
        longest_piece: characters of the longest piece of the vocabulary.
        lossless: whether every text is sure to come back from its ids.
    """

    special: re.Pattern[str]
    longest_piece: int
    lossless: bool

    @abstractmethod
    def encode(self, items: list[str]) -> tuple[np.ndarray, np.ndarray]: ...

    @abstractmethod
    def ends(self, text: str) -> list[int]:
        """The offset in a text at which each of its tokens, special ones left out, ends."""

    @abstractmethod
    def decode_rows(self, rows: list[list[int]]) -> list[str]:
        """The texts of token ids, special ones left out."""

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
        ends = lengths.cumsum()
        return self.decode_rows(
            [tokens[end - n : end].tolist() for end, n in zip(ends, lengths, strict=True)]
        )

    def most(self, max_length: int) -> int:
        # Up to LONG it costs little to see; much of it may be white space, which leaves no token.
        return max(LONG, max_length * self.longest_piece)

    def usable(self, items: list[str]) -> np.ndarray:
        clean = np.ones(len(items), bool)
        if self.special.search("\n".join(items)):  # rarely
            clean[:] = [not self.special.search(text) for text in items]
        # Such may leave no token.
        odd = [i for i, text in enumerate(items) if len(text) <= LONG and not WORD.search(text)]
        if odd:
            nothing = self.encode([""])[1]
            clean[odd] &= self.encode([items[i] for i in odd])[1] > nothing
        return clean

    def cut(self, item: str, max_length: int) -> Iterator[str]:
        size = self.most(max_length)
        for start in range(0, len(item), size):
            yield from self._cut(item[start : start + size], max_length)

    def _cut(self, item: str, max_length: int) -> Iterator[str]:
        ends = [0, *self.ends(item)]
        start = 0
        while start < len(item):
            last = bisect_right(ends, start) + max_length - 2
            end = ends[last] if last < len(ends) - 1 else len(item)
            while end > start and (tokens := self._tokens(item[start:end])) > max_length:
                fitting = start + (end - start) * max_length // tokens
                whole = ends[bisect_right(ends, fitting) - 1]  # does not break a token
                end = whole if whole > start else fitting
            if end > start:
                yield item[start:end]
            start = max(end, start + 1)

    def _tokens(self, text: str) -> int:
        return int(self.encode([text])[1][0])


@dataclass(frozen=True)
class FastEncoder(TextEncoder):
    """Tokenizes with the tokenizers library alone."""

    backend: "Tokenizer"

    def encode(self, items: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return _flat([encoding.ids for encoding in self.backend.encode_batch_fast(items)])

    def ends(self, text: str) -> list[int]:
        offsets = self.backend.encode(text, add_special_tokens=False).offsets
        return list(accumulate((end for _, end in offsets), max))

    def decode_rows(self, rows: list[list[int]]) -> list[str]:
        return self.backend.decode_batch(rows, skip_special_tokens=True)


@dataclass(frozen=True)
class SlowEncoder(TextEncoder):
    """Tokenizes with a tokenizer of transformers."""

    tokenizer: "PreTrainedTokenizerBase"

    def encode(self, items: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return _flat([self.tokenizer(text, verbose=False)["input_ids"] for text in items])

    def ends(self, text: str) -> list[int]:
        tokens = len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return [len(text) * i // tokens for i in range(1, tokens + 1)]  # as if all were as long

    def decode_rows(self, rows: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(
            rows, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


@dataclass(frozen=True)
class ByteEncoder(TextEncoder):
    """ByT5's: a token a byte."""

    def encode(self, items: list[str]) -> tuple[np.ndarray, np.ndarray]:
        content = np.frombuffer(b"".join(text.encode() + b"\xff" for text in items), np.uint8)
        ends = np.flatnonzero(content == 0xFF)  # no byte of UTF-8
        tokens = content.astype(np.int32) + 3
        tokens[ends] = 1
        return tokens, np.diff(ends, prepend=-1)

    def ends(self, text: str) -> list[int]:
        sizes = [len(character.encode()) for character in text]
        return np.repeat(np.arange(1, len(text) + 1), sizes).tolist()

    def decode_rows(self, rows: list[list[int]]) -> list[str]:
        contents = (bytes(token - 3 for token in row if 3 <= token < 259) for row in rows)
        return [content.decode(errors="ignore") for content in contents]


@dataclass(frozen=True)
class TokenEncoder:
    """Ends and checks sequences that are token ids already."""

    vocabulary: int
    pad_id: int
    eos_id: int
    texts: TextEncoder

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "TokenEncoder":
        """The encoder of ids of a tokenizer."""
        ids = tokenizer.pad_token_id, tokenizer.eos_token_id
        return cls(len(tokenizer), *ids, make_text_encoder(tokenizer))

    def most(self, max_length: int) -> int:
        return sys.maxsize

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
        return self.texts.decode(tokens, lengths)

    def plain(self, items: list[bytes]) -> list[bytes]:
        """Items without the end token and pads at their ends: equal sequences become equal."""
        return [self._content(item).tobytes() for item in items]

    def encode(self, items: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        end = np.array([self.eos_id], np.int32)
        rows = [ids for item in items for ids in (self._content(item), end)]
        lengths = np.fromiter(map(len, rows[::2]), np.int64, len(items)) + 1
        return np.concatenate(rows or [end[:0]]), lengths

    def usable(self, items: list[bytes]) -> np.ndarray:
        return np.fromiter(map(self._is_usable, map(self._content, items)), bool, len(items))

    def cut(self, item: bytes, max_length: int) -> Iterator[bytes]:
        ids = self._content(item)
        size = max_length - 1
        for start in range(0, len(ids), size):
            yield ids[start : start + size].tobytes()

    def _is_usable(self, ids: np.ndarray) -> bool:
        odd = (ids >= self.vocabulary) | (ids == self.pad_id) | (ids == self.eos_id)
        return len(ids) > 0 and not odd.any()

    def _content(self, item: bytes) -> np.ndarray:
        """An item's ids, int32 [length], up to its end token or the pads at its end."""
        ids = np.frombuffer(item, "<i4")
        ids = ids[: np.flatnonzero(ids != self.pad_id).max(initial=-1) + 1]
        return ids[:-1] if len(ids) and ids[-1] == self.eos_id else ids


def _flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths
