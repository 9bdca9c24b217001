"""The files of a checkpoint's ranks: safetensors, written to the disk, read by ranges.

Nothing is mapped: a disk that fails while a map is read ends a process by a signal.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from t5vae.checkpoint.files import ABSENT, Result, reach
from t5vae.common.errors import UserError, first_line

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
LARGEST_HEADER = 100_000_000  # bytes, safetensors' own limit


class Piece(NamedTuple):
    """A range of a flattened parameter, or of its moment, in a file.

    Attributes:
        start, length: of the range, in elements.
        offset: of its first byte.
    """

    start: int
    length: int
    dtype: torch.dtype
    path: Path
    offset: int


class Fragments:
    """The fragments in files of all ranks, read by parameter and range.

    A file is opened for each read and closed again: a mapped one ends the process where the storage
    fails.

    Args:
        paths: safetensors files.

    Attributes:
        metadata: of each file.

    Raises:
        StorageError: here and in reads, where the storage failed for minutes.
        UserError: likewise, for files that are damaged, gone, or may not be read.
    """

    def __init__(self, paths: list[Path]):
        self.metadata: list[dict[str, str]] = []
        self.ranges: dict[tuple[str, str], list[Piece]] = {}
        for path in paths:
            metadata, pieces = _contents(path)
            self.metadata.append(metadata)
            for key, piece in pieces:
                self.ranges.setdefault(key, []).append(piece)

    def kinds(self, name: str) -> set[str]:
        """Of what is there of a parameter."""
        return {kind for kind, parameter in self.ranges if parameter == name}

    def length(self, kind: str, name: str) -> int:
        """Elements of a whole parameter, or of its moment."""
        return max(piece.start + piece.length for piece in self.ranges[kind, name])

    def dtype(self, kind: str, name: str) -> torch.dtype:
        return self.ranges[kind, name][0].dtype

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """A range of a flattened parameter, or of its moment, of shape [length].

        Raises:
            ValueError: where elements of it are in no file.
        """
        parts = []
        for piece in sorted(self.ranges[kind, name], key=lambda piece: piece.start):
            low = max(start, piece.start)
            high = min(start + length, piece.start + piece.length)
            if low < high:
                parts.append((low, high, piece))
        begins, ends = [low for low, _, _ in parts], [high for _, high, _ in parts]
        if length and [*begins, start + length] != [start, *ends]:
            covered = sum(ends) - sum(begins)
            raise ValueError(f"{kind} of {name}: {covered} of {length} elements are saved")
        read = torch.empty(length, dtype=self.dtype(kind, name))
        for low, high, piece in parts:
            content = read[low - start : high - start].view(torch.uint8).numpy()
            at = piece.offset + (low - piece.start) * piece.dtype.itemsize
            _read(piece.path, at, memoryview(content))
        return read


def _contents(path: Path) -> tuple[dict[str, str], list[tuple[tuple[str, str], Piece]]]:
    """A safetensors file's metadata, and its pieces with their kind and parameter.

    Raises:
        UserError: it is no such file, or names what it does not hold.
    """
    size = _reach(path, path.stat).st_size
    pieces, held = [], 0
    try:
        length = int.from_bytes(_bytes(path, 0, 8), "little")
        if length > min(size - 8, LARGEST_HEADER):
            raise ValueError("a header of another file")
        header, first = json.loads(_bytes(path, 8, length)), 8 + length
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata of another file")
        for key, entry in header.items():
            kind, _, rest = key.partition("/")
            name, _, start = rest.rpartition("/")
            begin, end = map(int, entry["data_offsets"])
            dtype, elements = DTYPES[entry["dtype"]], math.prod(map(int, entry["shape"]))
            whole = end - begin == elements * dtype.itemsize
            if not (whole and 0 <= begin <= end <= size - first):
                raise ValueError(f"{key} lies elsewhere")
            piece = Piece(int(start), elements, dtype, path, first + begin)
            pieces.append(((kind, name), piece))
            held += end - begin
        if held > size - first:
            raise ValueError("more than the file holds")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        raise _damaged(path) from None
    return metadata, pieces


def _bytes(path: Path, offset: int, length: int) -> bytes:
    content = bytearray(length)
    _read(path, offset, memoryview(content))
    return bytes(content)


def _read(path: Path, offset: int, into: memoryview) -> None:
    """Fill a buffer from a file, which is opened for it; again where the storage fails."""

    def attempt() -> bool:
        descriptor, at = os.open(path, os.O_RDONLY), 0
        try:
            while at < len(into) and (count := os.preadv(descriptor, [into[at:]], offset + at)):
                at += count
        finally:
            os.close(descriptor)
        return at == len(into)

    if not _reach(path, attempt):
        raise _damaged(path)


def _reach(path: Path, attempt: Callable[[], Result]) -> Result:
    try:
        return reach(path, attempt)
    except ABSENT as error:
        raise UserError(f"cannot reach {path}: {first_line(error)}") from None


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path} is damaged: it is no whole safetensors file; restore it from a copy, or remove "
        "its checkpoint to go on from the one before"
    )


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Any]:
    """Write a safetensors file, synced to the disk; its size in bytes and sha256.

    The library's own writer first copies everything into strings, and halts other threads
    meanwhile; here one tensor at a time is copied, and hashed as it is written.

    Raises:
        OSError: if it cannot be written.
    """
    largest_first = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in largest_first:  # so that every tensor is aligned to its elements
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for content in (len(text).to_bytes(8, "little"), text):
            file.write(content)
            digest.update(content)
        for name in largest_first:
            content = tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().data
            file.write(content)
            digest.update(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": 8 + len(text) + end, "sha256": digest.hexdigest()}
