"""The files of a checkpoint's ranks: safetensors, written to the disk, read by ranges.

Nothing is mapped: a disk that fails while a map is read ends a process by a signal.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from t5vae.checkpoint.files import ABSENT, Result, reach
from t5vae.checkpoint.opened import OpenFiles
from t5vae.checkpoint.places import DTYPES, NAMES, Places
from t5vae.common.errors import UserError, first_line

LARGEST_HEADER = 100_000_000  # bytes, safetensors' own limit


def file_name(rank: int) -> str:
    """A rank's file in its checkpoint."""
    return f"rank-{rank:05d}.safetensors"


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


class Header(NamedTuple):
    """What a file says that it holds.

    Attributes:
        pieces: by kind and parameter.
    """

    metadata: dict[str, str]
    pieces: dict[tuple[str, str], list[Piece]]


class Fragments:
    """The fragments in files of all ranks, read by parameter and range.

    A context manager, which closes what it has open.

    Args:
        paths: safetensors files, in the order of their ranks.
        places: where everything is, so that a file's header is read once something of that file is.
            None where that is not known: all headers are read now.

    Raises:
        StorageError: here and in reads, where the storage failed for minutes.
        UserError: likewise, for files that are damaged, gone, may not be read, or do not hold what
            is placed there.
    """

    def __init__(self, paths: list[Path], places: Places | None = None):
        self.paths, self.places = paths, places
        self.files = OpenFiles()
        self.headers: dict[Path, Header] = {}
        self.pieces: dict[tuple[str, str], list[Piece]] = {}
        if places is None:
            for path in paths:
                for key, pieces in self.header(path).pieces.items():
                    self.pieces.setdefault(key, []).extend(pieces)
            for pieces in self.pieces.values():
                pieces.sort(key=lambda piece: piece.start)

    def __enter__(self) -> "Fragments":
        return self

    def __exit__(self, *error: object) -> None:
        self.files.close()

    def header(self, path: Path) -> Header:
        """A file's; it is read once."""
        if path not in self.headers:
            self.headers[path] = _header(path, partial(self._read, path))
        return self.headers[path]

    def contents(self) -> list[tuple[str, str]]:
        """What there is: kinds and their parameters."""
        return list(self.pieces if self.places is None else self.places)

    def kinds(self, name: str) -> set[str]:
        """Of what is there of a parameter."""
        return {kind for kind, parameter in self.contents() if parameter == name}

    def length(self, kind: str, name: str) -> int:
        """Elements of a whole parameter, or of its moment."""
        if self.places is None:
            return sum(piece.length for piece in self.pieces[kind, name])
        return self.places[kind, name].place.elements

    def dtype(self, kind: str, name: str) -> torch.dtype:
        if self.places is None:
            return self.pieces[kind, name][0].dtype
        return self.places[kind, name].dtype

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """A range of a flattened parameter, or of its moment, of shape [length].

        Raises:
            ValueError: where elements of it are in no file.
        """
        parts = []
        for piece in self._pieces(kind, name, start, length):
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
            self._read(piece.path, at, memoryview(content))
        return read

    def file_by_file(self, kind: str) -> Iterator[tuple[str, int, int]]:
        """Ranges, each a parameter, start and length, of all that there is of a kind.

        Whoever reads them in their order opens each file once, and needs one header at a time.
        Without places, whose headers are there already, each is a whole parameter.
        """
        if self.places is None:
            yield from ((name, 0, self.length(of, name)) for of, name in self.pieces if of == kind)
            return
        places = {name: placed.place for (of, name), placed in self.places.items() if of == kind}
        for rank, path in enumerate(self.paths):
            for name, place in places.items():
                start, length = place.part(rank)
                if length:
                    yield name, start, length
            self.headers.pop(path, None)

    def read_piece(self, piece: Piece) -> Tensor:
        """All of it, as `header` gives it."""
        read = torch.empty(piece.length, dtype=piece.dtype)
        self._read(piece.path, piece.offset, memoryview(read.view(torch.uint8).numpy()))
        return read

    def _read(self, path: Path, offset: int, into: memoryview) -> None:
        if not _there(path, lambda: self.files.fill(path, offset, into)):
            raise _damaged(path)

    def _pieces(self, kind: str, name: str, start: int, length: int) -> list[Piece]:
        """Those that hold a range, in order; without places, all of the parameter."""
        if self.places is None:
            return self.pieces[kind, name]
        placed, found = self.places[kind, name], []
        for rank in placed.place.ranks(start, length):
            path = self.paths[rank]
            pieces = self.header(path).pieces.get((kind, name), [])
            if [piece[:3] for piece in pieces] != [(*placed.place.part(rank), placed.dtype)]:
                raise _damaged(path, "it does not hold what its checkpoint's manifest says")
            found += pieces
        return found


def _header(path: Path, fill: Callable[[int, memoryview], None]) -> Header:
    """What a safetensors file says of itself.

    Args:
        fill: a buffer from an offset of it.

    Raises:
        UserError: it is no such file, or names what it does not hold.
    """
    size = _there(path, lambda: reach(path, path.stat)).st_size
    pieces: dict[tuple[str, str], list[Piece]] = {}
    held = 0
    try:
        length = int.from_bytes(_bytes(fill, 0, 8), "little")
        if length > min(size - 8, LARGEST_HEADER):
            raise ValueError("a header of another file")
        header, first = json.loads(_bytes(fill, 8, length)), 8 + length
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
            pieces.setdefault((kind, name), []).append(piece)
            held += end - begin
        if held > size - first:
            raise ValueError("more than the file holds")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        raise _damaged(path) from None
    return Header(metadata, pieces)


def _bytes(fill: Callable[[int, memoryview], None], offset: int, length: int) -> bytes:
    content = bytearray(length)
    fill(offset, memoryview(content))
    return bytes(content)


def _there(path: Path, attempt: Callable[[], Result]) -> Result:
    try:
        return attempt()
    except ABSENT as error:
        raise UserError(f"cannot reach {path}: {first_line(error)}") from None


def _damaged(path: Path, why: str = "it is no whole safetensors file") -> UserError:
    return UserError(
        f"{path} is damaged: {why}; restore it from a copy, or remove its checkpoint to go on from "
        "the one before"
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
