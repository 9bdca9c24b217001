"""What tokens spell: the bytes of each, by whose hashes texts are looked for among sequences.

To decode a billion sequences takes hours; to hash what their tokens spell takes an array's work.
Equal texts have equal hashes, so what hashes otherwise is another text; the few sequences that hash
alike are decoded. So the answer is that of a comparison of texts.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

BASE = 0x9E3779B97F4A7C15  # odd, so that no power of it is 0
UNKNOWN = "\ufffd"  # what stands for bytes that are no UTF-8


class Hashes:
    """Hashes of rows of tokens: equal where the bytes of their tokens, one after the other, are.

    A row's is the sum of (byte + 1) * BASE**place over its bytes, modulo 2^64.

    Args:
        pieces: the bytes of each token id.
    """

    def __init__(self, pieces: Sequence[bytes]):
        self._powers = np.ones(1, np.uint64)
        self.sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
        self.values = self.contents(pieces)

    def contents(self, contents: Sequence[bytes]) -> np.ndarray:
        """Of bytes, uint64 [contents]."""
        flat = np.frombuffer(b"".join(contents), np.uint8).astype(np.uint64) + np.uint64(1)
        lengths = np.fromiter(map(len, contents), np.int64, len(contents))
        return self._sums(flat, np.ones(len(flat), np.int64), lengths)

    def rows(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Of sequences, uint64 [rows].

        Args:
            tokens: int [sum of lengths].
            lengths: int [rows].
        """
        return self._sums(self.values[tokens], self.sizes[tokens], lengths)

    def _sums(self, values: np.ndarray, sizes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        ends = np.cumsum(lengths, dtype=np.int64)
        starts = ends - lengths
        places = np.concatenate([[0], np.cumsum(sizes)])
        place = places[:-1] - np.repeat(places[starts], lengths)
        self._reach(int(place.max(initial=0)))
        sums = np.zeros(len(values) + 1, np.uint64)
        np.cumsum(values * self._powers[place], out=sums[1:])
        return sums[ends] - sums[starts]

    def _reach(self, place: int) -> None:
        if place >= len(self._powers):
            powers = np.full(2 * place, BASE, np.uint64)
            powers[0] = 1
            self._powers = np.cumprod(powers)


class View(NamedTuple):
    """Some texts, and how they show in the bytes of tokens.

    Attributes:
        pieces: the bytes of each token id; what they make up of a sequence is `shown` of its text.
        shown: what of a text's UTF-8 they make up.
        of: which texts this holds of.
        among: whether it holds of sequences, by all tokens of a block.
    """

    pieces: Sequence[bytes]
    shown: Callable[[bytes], bytes]
    of: Callable[[str], bool] = lambda text: True
    among: Callable[[np.ndarray], bool] = lambda tokens: True


def views(tokenizer: PreTrainedTokenizerBase) -> list[View] | None:
    """By which all texts can be told apart; None where a text may be more than its pieces."""
    texts = tokenizer.batch_decode(
        [[token] for token in range(len(tokenizer))],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    if isinstance(tokenizer, ByT5Tokenizer):
        return list(_of_bytes(texts))
    kind = tokenizer.backend_tokenizer.decoder if tokenizer.is_fast else None
    match type(kind).__name__:
        case "ByteLevel":
            return list(_of_byte_pieces(texts, tokenizer))
        case "Metaspace":  # drops a space before the text
            return [View([_unspaced(text.encode()) for text in texts], _unspaced)]
    return None


def _of_bytes(texts: Sequence[str]) -> Iterator[View]:
    """ByT5's: a token a byte. Bytes that are no UTF-8 are left out of a text."""
    pieces = [
        text.encode() or (bytes([token - 3]) if 3 <= token < 259 else b"")
        for token, text in enumerate(texts)
    ]
    single = b"".join(piece if len(piece) == 1 else b"\n" for piece in pieces)
    of_token = np.frombuffer(single, np.uint8)

    def is_broken(tokens: np.ndarray) -> bool:
        try:
            of_token[tokens].tobytes().decode()
        except UnicodeDecodeError:
            return True
        return False

    yield View(pieces, bytes)
    yield View([_ascii(piece) for piece in pieces], _ascii, among=is_broken)


def _of_byte_pieces(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[View]:
    """A byte-level BPE's. Bytes that are no UTF-8 are told in a text."""
    byte_of = {character: bytes([byte]) for byte, character in bytes_to_unicode().items()}

    def spelled(token: int, text: str) -> bytes:
        if UNKNOWN not in text:
            return text.encode()
        piece = tokenizer.convert_ids_to_tokens(token)
        if not set(piece) <= set(byte_of):  # an added one is as it is
            return piece.encode()
        return b"".join(byte_of[character] for character in piece)

    pieces = [spelled(token, text) for token, text in enumerate(texts)]
    yield View(pieces, bytes, of=lambda text: UNKNOWN not in text)
    yield View([_ascii(piece) for piece in pieces], _ascii, of=lambda text: UNKNOWN in text)


def _ascii(content: bytes) -> bytes:
    """What shows whatever becomes of bytes that are no UTF-8."""
    return bytes(byte for byte in content if byte < 128)


def _unspaced(content: bytes) -> bytes:
    return content.replace(b" ", b"")
