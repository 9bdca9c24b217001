"""Tensors kept in a file, with what they were made from; and arrays."""

import json
import math
import os
import warnings
from contextlib import suppress
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO, Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from t5vae.common.errors import UserError
from t5vae.common.files import parse_json
from t5vae.common.openers import only_file


def write_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    about: dict[str, Any],
    version: int,
    made_from: dict[str, Any],
) -> None:
    """Write a safetensors file, of which a reader sees the old one or the new one, never a part.

    Args:
        path: the file; its folder is made if need be.
        tensors: by name; on any device.
        about: them, by name; values fit for JSON.
        version: of the format.
        made_from: what they were made from, fit for JSON.

    Raises:
        UserError: if that fails; the file is as it was.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    metadata = {"format_version": version, "made_from": made_from, **about}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            part,
            {name: json.dumps(value) for name, value in metadata.items()},
        )
        part.replace(path)
    except (SafetensorError, OSError) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}") from None


def read_tensors(
    path: Path, version: int, made_from: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `write_tensors` was given: tensors, on the CPU, and what is about them.

    None where there is no such file, it is of another version or was made from something else.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            written = file.metadata() or {}
            about = {name: parse_json(value) for name, value in written.items()}
            if about.pop("format_version") != version or about.pop("made_from") != made_from:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, about
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise damaged(path, error) from None


def open_array(path: Path) -> np.ndarray:
    """An array of a .npy file, mapped into memory.

    Raises:
        ValueError: it is no whole array of numbers.
        OSError: it cannot be read.
    """
    with open(path, "rb", opener=only_file) as file:
        shape, fortran, dtype = _header(file, os.fstat(file.fileno()).st_size)
        begin = file.tell()
    order: Literal["F", "C"] = "F" if fortran else "C"
    if 0 in shape:  # nothing to map
        return np.empty(shape, dtype, order)
    return np.memmap(path, dtype, "r", begin, shape, order)


def load_array(file: BinaryIO, size: int) -> np.ndarray:
    """The same of a stream of so many bytes, copied.

    Raises:
        ValueError: it is no whole array of numbers.
    """
    _header(file, size)
    file.seek(0)
    return np.load(file, allow_pickle=False)


def _header(file: BinaryIO, size: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """What a .npy file says of its array, if all of that is there: its bytes are counted before
    memory for them is taken. numpy writes version 1 for all arrays of numbers."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not an array of numbers")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that Python 2 wrote it
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except (MemoryError, RecursionError, TokenError, TypeError) as error:  # of its parser
        raise ValueError(f"its header is none ({type(error).__name__})") from None
    if dtype.kind not in "fiu" or any(extent < 0 for extent in shape):
        raise ValueError("not an array of numbers")
    if math.prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError("its header and its size differ")
    return shape, fortran, dtype


def damaged(path: Path, error: Exception) -> UserError:
    """What to tell a user whose kept file is not whole."""
    return UserError(f"{path} is damaged ({error!r}): remove it")
