"""Tensors kept in a file, with what they were made from."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shards.errors import UserError


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a safetensors file, of which a reader sees the old one or the new one, never a part.

    Args:
        path: the file; its folder is made if need be.
        tensors: by name; on any device.
        metadata: by name; values fit for JSON.

    Raises:
        OSError: if that fails; the file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            part,
            {name: json.dumps(value) for name, value in metadata.items()},
        )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors, on the CPU, and the metadata of a file; None where there is none.

    Tuples in the metadata come back as lists.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            written = file.metadata() or {}
        return tensors, {name: json.loads(value) for name, value in written.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it") from None
