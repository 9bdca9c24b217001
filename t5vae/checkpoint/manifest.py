"""A checkpoint's manifest: what it is of, and whether it is whole.

A checkpoint is a folder `step-00001000` with a file of each rank (`t5vae.checkpoint.fragments`) and
a manifest of their sizes and hashes. A folder without a manifest that verifies is no checkpoint.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationInfo, field_validator

from t5vae.checkpoint.files import ABSENT, reach
from t5vae.checkpoint.fragments import LOSS_SCALE, WEIGHT
from t5vae.checkpoint.places import DTYPES, places_of
from t5vae.checkpoint.rank_files import Fragments, file_name
from t5vae.common import records
from t5vae.common.cpus import cpus
from t5vae.common.errors import UserError
from t5vae.common.files import head, parse_json
from t5vae.common.records import Record

MANIFEST = "manifest.json"
FORMAT = 2


class _File(Record):
    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class _Files(Record):
    """What a manifest of any version holds."""

    files: dict[Annotated[str, Field(pattern=r"^rank-[0-9]{5}\.safetensors$")], _File]


class _Group(Record):
    """Parameters of the same kinds: of each its offset, its elements, and the size of a piece."""

    kinds: dict[str, Annotated[str, Field(pattern=f"^({'|'.join(DTYPES)})$")]]
    parameters: dict[
        str,
        Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=3, max_length=3)],
    ]


class _Layout(Record):
    world_size: Annotated[int, Field(ge=1)]
    zero_stage: int
    precision: str


class _Scalars(Record):
    step: float | None
    loss_scale: dict[
        Annotated[str, Field(pattern=f"^({'|'.join(LOSS_SCALE)})$")], int | float | None
    ]


class _Manifest(_Files):
    """What is used of this version's, besides what a run and its checkpoint have in common."""

    step: Annotated[int, Field(ge=0)]
    layout: _Layout
    scalars: _Scalars
    model: dict[str, Any]
    data: dict[str, Any]
    watch: dict[str, int | float | dict[str, float]]
    held_out: float | None
    weights_from: str | None
    ranges: list[_Group] = Field(default=[])

    @field_validator("ranges")
    @classmethod
    def _lie_in_the_files(cls, ranges: list[_Group], info: ValidationInfo) -> list[_Group]:
        files = info.data.get("files", {})
        if ranges and set(files) != {file_name(rank) for rank in range(len(files))}:
            raise ValueError("files of some ranks are missing")
        held = 0
        for (kind, name), (place, dtype) in places_of(map(dict, ranges)).items():
            end = place.offset + place.elements
            if not (place.elements > 0 and 0 < end <= place.size * len(files)):
                raise ValueError(f"{kind} of {name} lies elsewhere")
            held += place.elements * dtype.itemsize
        if held > sum(file.bytes for file in files.values()):
            raise ValueError("more than the files hold")
        return ranges


def verify(checkpoint: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None: every file's size and sha256 are compared.

    Args:
        hashes: compare sizes alone if false.

    Raises:
        StorageError: the storage failed for minutes, which says nothing of the checkpoint.
        UserError: its files may not be read.
    """
    try:
        files = read_manifest(checkpoint)["files"]
    except (*ABSENT, ValueError) as error:
        return f"{MANIFEST}: {error}"
    with ThreadPoolExecutor(min(8, cpus())) as threads:
        problems = threads.map(lambda name: _problem(checkpoint / name, files[name], hashes), files)
        return next((problem for problem in problems if problem), None)


def _problem(path: Path, wanted: dict[str, Any], hashes: bool) -> str | None:
    try:
        size = reach(path, path.stat).st_size
        if size != wanted["bytes"]:
            return f"{path.name} has {size} bytes, not {wanted['bytes']}"
        changed = hashes and reach(path, lambda: _sha256(path)) != wanted["sha256"]
    except ABSENT:
        return f"{path.name} is missing"
    return f"{path.name} has changed" if changed else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(manifest: dict[str, Any]) -> bytes:
    """A manifest's file: itself, and its own hash."""
    return json.dumps({**manifest, "seal": fingerprint(manifest)}, indent=1).encode()


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's manifest.

    Raises:
        FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError: where there is none,
            or not as it was written.
        StorageError, UserError: see `reach`.
    """
    return parse(_content(checkpoint))


def _content(checkpoint: Path) -> bytes:
    return reach(checkpoint / MANIFEST, partial(head, checkpoint / MANIFEST))


def parse(content: bytes) -> dict[str, Any]:
    """A manifest out of its file.

    Raises:
        ValueError: it is not as it was written.
    """
    manifest = parse_json(content)
    try:
        if not isinstance(manifest, dict) or manifest.pop("seal", None) != fingerprint(manifest):
            raise ValueError("it has changed")
    except RecursionError:
        raise ValueError("nested too deep") from None
    records.parse(_Manifest if manifest.get("format") == FORMAT else _Files, manifest)
    return manifest


def fingerprint(said: Any) -> str:
    """Of what a manifest says, or of a part of it."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def digest(checkpoint: Path) -> str:
    """A fingerprint of a checkpoint's content."""
    return hashlib.sha256(_content(checkpoint)).hexdigest()


def check_identity(manifest: dict[str, Any], identity: dict[str, Any]) -> None:
    """Refuse to resume a run as another one.

    Raises:
        UserError: naming the first thing that differs, with both values.
    """
    for name, value in identity.items():
        for where, saved, now in _differences(name.replace("_", " "), manifest.get(name), value):
            raise UserError(
                f"cannot resume: the checkpoint of step {manifest['step']} was saved with "
                f"{where} {_brief(saved)}, this run has {_brief(now)}; "
                "restore it, or choose another run.output_dir"
            )


def _differences(name: str, saved: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in now | saved:
            yield from _differences(f"{name}.{key}", saved.get(key), now.get(key))
    elif saved != now:
        yield name, saved, now


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def open_fragments(checkpoint: Path) -> Fragments:
    """What all ranks saved."""
    return fragments_of(checkpoint, read_manifest(checkpoint))


def fragments_of(checkpoint: Path, manifest: dict[str, Any]) -> Fragments:
    """The same, of a manifest that has been read."""
    paths = [checkpoint / name for name in sorted(manifest["files"])]
    ranges = manifest.get("ranges") if manifest.get("format") == FORMAT else None
    return Fragments(paths, places_of(ranges) if ranges else None)


def consolidated_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's fp32 weights by parameter, flattened, on the CPU."""
    with open_fragments(checkpoint) as saved:
        names = [name for kind, name in saved.contents() if kind == WEIGHT]
        return {name: saved.read(WEIGHT, name, 0, saved.length(WEIGHT, name)) for name in names}
