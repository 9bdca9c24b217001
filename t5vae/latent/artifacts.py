"""Tensors kept in a file, with what they were made from."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from t5vae.common.errors import UserError


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
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            written = file.metadata() or {}
            about = {name: json.loads(value) for name, value in written.items()}
            if about.pop("format_version") != version or about.pop("made_from") != made_from:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, about
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> UserError:
    """What to tell a user whose kept file is not whole."""
    return UserError(f"{path} is damaged ({error!r}): remove it")
