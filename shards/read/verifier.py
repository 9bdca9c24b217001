"""Verify a dataset: every byte against the index, in one pass over each shard."""

import hashlib
import io
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, BinaryIO, cast

import numpy as np

from shards.format.blocks import SLACK, wrong_with
from shards.format.index import Index, Shard, open_index
from shards.format.tokenizers import fingerprint
from shards.storage.cache import Cache
from shards.storage.store import UnreadableError, refuse_replaced, unreadable
from t5vae.common.cpus import cpus
from t5vae.common.errors import DamageError, UserError
from t5vae.common.progress import Advance, stage
from t5vae.common.storage import patiently

CHUNK = 4 * 2**20
RECORD = 512  # a tar is made of such, and ends with two of zeros
AT_ONCE = 4096  # shards that are handed out together; each that waits takes 1.5 KiB
CUT_OFF = "is cut off (the shard is too short)"
OTHER_READERS = "other tar readers may fail"


@dataclass(frozen=True)
class Report:
    """What was checked and what is wrong; each problem names its file, and block where it can."""

    path: str
    shards: int = 0
    blocks: int = 0
    sequences: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(path: str | Path, workers: int | None = None) -> Report:
    """Check every file that a dataset's index names; others in its folder do not matter.

    Args:
        path: a folder, or a URL, whose files are then read from there and not from the cache.
        workers: how many shards are read at a time; by default one for each CPU that this process
            may use.

    Raises:
        UserError: there is no dataset, or a file of it may not be read.
        StorageError: the storage failed for minutes.
    """
    with TemporaryDirectory() as folder:
        try:
            index = open_index(path, Cache(Path(folder)))
            table = index.blocks
        except DamageError as error:
            return Report(str(path), problems=[str(error)])
        tokenizer = list(_tokenizer(index))
    names = {shard.sha256: shard.name for shard in index.shards}
    found = {split: np.zeros(index.max_length + 1, np.int64) for split in index.splits}
    tables = np.split(table, np.searchsorted(table["shard"], range(1, len(index.shards))))
    lock = Lock()
    with (
        stage("verified", sum(shard.bytes for shard in index.shards), unit="bytes") as advance,
        ThreadPoolExecutor(workers or cpus()) as pool,
    ):

        def count(read: int) -> None:
            with lock:
                advance(read)

        def check(shard: Shard, table: np.ndarray) -> list[str]:
            one = _Pass(index, shard, table, names, count)
            problems = one.problems()
            with lock:
                if shard.split in found:
                    found[shard.split] += one.histogram
            return problems

        damages: list[str] = []
        for begin in range(0, len(tables), AT_ONCE):
            some = slice(begin, begin + AT_ONCE)
            damages += chain.from_iterable(pool.map(check, index.shards[some], tables[some]))
    if damages:
        again = partial(refuse_replaced, index.path, index.store.get, index.sha256)
        try:
            patiently(again, f"{index.path}/index.json")
        except UserError as error:
            damages = [str(error)]
    problems = [*damages, *tokenizer]
    if not damages:
        problems += _histograms(index, found)
    sequences = sum(totals.sequences for totals in index.splits.values())
    return Report(index.path, len(index.shards), len(table), sequences, problems)


class _Hashed(io.RawIOBase):
    """A file whose content is hashed, and counted, while it is read."""

    def __init__(self, file: BinaryIO, advance: Advance):
        self.sha256 = hashlib.sha256()
        self._file = cast(io.BufferedReader, file)
        self._advance = advance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self.sha256.update(buffer[:count])
        self._advance(count)
        return count


class _Pass:
    """One pass over a shard.

    Args:
        names: of the dataset's shards, by their sha256.

    Attributes:
        histogram: int64 [max_length + 1], the sequences of its whole blocks by length.
    """

    def __init__(
        self,
        index: Index,
        shard: Shard,
        table: np.ndarray,
        names: dict[str, str],
        advance: Advance,
    ):
        self.histogram = np.zeros(index.max_length + 1, np.int64)
        self._index, self._shard, self._table, self._names = index, shard, table, names
        self._where = f"{index.path}/{shard.name}"
        self._advance = advance
        self._at = 0
        self._sha256 = ""
        self._damaged: dict[int, str] = {}
        self._headers: dict[int, str] = {}
        self._ended = True

    def problems(self) -> list[str]:
        """Read the shard, and say what is wrong with it."""
        try:
            opener = partial(self._index.store.open, self._shard.name)
            with patiently(opener, self._where) as file:
                hashed = _Hashed(file, self._advance)
                content = io.BufferedReader(hashed, CHUNK)
                self._read_blocks(content)
                self._read_end(content)
                self._sha256 = hashed.sha256.hexdigest()
        except FileNotFoundError:
            return [f"{self._where} is missing"]
        except OSError as error:
            raise unreadable(self._where, error) from None
        return list(self._lines())

    def _read_blocks(self, file: BinaryIO) -> None:
        for block, entry in enumerate(self._table):
            lengths = self._array(file, block, "lengths", int(entry["sequences"]), "<u2")
            tokens = self._array(file, block, "tokens", int(entry["tokens"]), self._index.dtype)
            if lengths is None or tokens is None:
                self._damaged |= dict.fromkeys(range(block, len(self._table)), CUT_OFF)
                return
            if problem := _problem(self._index, entry, lengths, tokens):
                self._damaged[block] = problem
            else:
                self.histogram += np.bincount(lengths, minlength=len(self.histogram))

    def _array(
        self, file: BinaryIO, block: int, name: str, count: int, dtype: str
    ) -> np.ndarray | None:
        """One array of a block, or None where the file ends within it."""
        begin, size = int(self._table[block][f"{name}_offset"]), count * np.dtype(dtype).itemsize
        padding = -self._at % RECORD
        header = self._read(file, begin - self._at)[padding:]
        content = self._read(file, size)
        if len(content) < size:
            return None
        if problem := _header_problem(header, dtype, count):
            self._headers[block] = problem
        return np.frombuffer(content, dtype)

    def _read_end(self, file: BinaryIO) -> None:
        end = self._at + -self._at % RECORD + 2 * RECORD
        while self._at <= self._shard.bytes + SLACK and (content := self._read(file, CHUNK)):
            self._ended &= not content.strip(b"\0")
        self._ended &= self._at >= end

    def _read(self, file: BinaryIO, size: int) -> bytes:
        content = file.read(size)
        self._at += len(content)
        return content

    def _lines(self) -> Iterator[str]:
        if self._sha256 == self._shard.sha256:
            if self._at != self._shard.bytes:
                index = f"{self._index.path}/index.json"
                yield f"{index}: the bytes of {self._shard.name} are wrong"
            yield from _grouped(self._where, self._damaged)
            return
        if other := self._names.get(self._sha256):
            yield f"{self._where} holds what {other} should: bring both back"
            return
        whole = "" if self._damaged else ", but its blocks are whole"
        if self._at != self._shard.bytes:
            more = " or more" if self._at > self._shard.bytes + SLACK else ""
            there = f"{self._at:,} bytes{more} instead of {self._shard.bytes:,}"
            yield f"{self._where} has {there}{whole}"
        else:
            yield f"{self._where} is not what was written (its sha256 differs){whole}"
        yield from _grouped(self._where, self._headers | self._damaged)
        if not self._ended and CUT_OFF not in self._damaged.values():
            yield f"{self._where} has no whole end-of-archive: {OTHER_READERS}"


def _problem(index: Index, entry: np.void, lengths: np.ndarray, tokens: np.ndarray) -> str:
    """What is wrong with a block's arrays, if anything."""
    if zlib.crc32(tokens.data, zlib.crc32(lengths.data)) != entry["crc32"]:
        return "is damaged (its checksum differs)"
    if problem := wrong_with(lengths, tokens, index.max_length, index.vocab_size):
        return problem
    if np.any(tokens[np.cumsum(lengths, dtype=np.int64) - 1] != index.eos_id):
        return "has sequences without an end token"
    if index.pad_id != index.eos_id and np.any(tokens == index.pad_id):
        return "has pads in its sequences"
    return ""


def _header_problem(header: bytes, dtype: str, count: int) -> str:
    """What is wrong with the headers before an array: one of tar and one of npy."""
    size = len(header) - RECORD + count * np.dtype(dtype).itemsize
    if not _is_tar_header(header[:RECORD], size):
        return f"is whole, but a tar header of it is damaged: {OTHER_READERS}"
    expected = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        expected, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (count,)}
    )
    if header[RECORD:] != expected.getvalue():
        return f"is whole, but an npy header of it is damaged: {OTHER_READERS}"
    return ""


def _is_tar_header(header: bytes, size: int) -> bool:
    """Whether a record is the header of a file of that size."""
    checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    try:
        numbers = [int(digits.strip(b" \0"), 8) for digits in (header[124:136], header[148:156])]
    except ValueError:
        return False
    return numbers == [size, checksum]


def _grouped(where: str, problems: dict[int, str]) -> Iterator[str]:
    """One line for each run of blocks with the same problem."""
    blocks = sorted(problems)
    runs = groupby(range(len(blocks)), lambda i: (blocks[i] - i, problems[blocks[i]]))
    for (shift, problem), places in runs:
        first, *others = places
        more = f"; so are the {len(others)} after it" if others else ""
        yield f"{where}, block {first + shift} {problem}{more}"


def _histograms(index: Index, found: dict[str, np.ndarray]) -> Iterator[str]:
    for name, split in index.splits.items():
        if np.trim_zeros(found[name], "b").tolist() != split.length_histogram:
            yield f"{index.path}/index.json: the length histogram of split {name} is wrong"


def _tokenizer(index: Index) -> Iterator[str]:
    where = f"{index.path}/tokenizer"
    try:
        tokenizer = index.tokenizer()
    except UnreadableError:
        raise
    except UserError as error:
        yield str(error)
        return
    if fingerprint(tokenizer) != index.tokenizer_fingerprint:
        yield f"{where} is not the tokenizer the dataset was built with"
