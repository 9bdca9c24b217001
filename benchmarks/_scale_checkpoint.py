"""A checkpoint of T5-11B by up to 1,024 ranks, as one of them meets it; for `scale.py`.

Places, manifest, choice of files and headers are the product's own; the weights are not there. A
rank's file is made in a folder, as a sparse one, where its header is read.
"""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import _report  # noqa: F401  finds the packages
import torch

from t5vae.checkpoint.manifest import FORMAT, seal
from t5vae.checkpoint.places import Place, grouped, places_of
from t5vae.checkpoint.rank_files import Fragments, file_name
from t5vae.checkpoint.verifying import own_files
from t5vae.model import T5VAE, T5VAEConfig

KINDS = ("weight", "exp_avg", "exp_avg_sq")
ELEVEN_BILLION = {"d_model": 1024, "d_ff": 65536, "num_layers": 24, "num_heads": 128, "d_kv": 128}


def lengths() -> dict[str, int]:
    """Elements of each parameter."""
    with torch.device("meta"):
        model = T5VAE(T5VAEConfig(t5={**ELEVEN_BILLION, "vocab_size": 32128}, sequence_length=512))
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def laid_out(stage: int, world: int, elements: dict[str, int]) -> dict[str, Place]:
    """Where ranks hold parameters, as DeepSpeed deals them: each by itself at ZeRO 3, else all in
    a row."""
    if stage == 3:
        return {name: Place(0, length, -(-length // world)) for name, length in elements.items()}
    size, offset, places = -(-sum(elements.values()) // world), 0, {}
    for name, length in elements.items():
        places[name] = Place(offset, length, size)
        offset += length
    return places


def write_sparse(folder: Path, places: dict[str, Place], rank: int) -> int:
    """A rank's file with its header, and nothing else on the disk; the header's bytes."""
    header: dict[str, Any] = {"__metadata__": {"random": "{}"}}
    end = 0
    for kind in KINDS:
        for name, place in places.items():
            start, length = place.part(rank)
            if length:
                begin, end = end, end + 4 * length
                offsets = {"data_offsets": [begin, end]}
                header[f"{kind}/{name}/{start}"] = {"dtype": "F32", "shape": [length], **offsets}
    text = json.dumps(header).encode()
    with open(folder / file_name(rank), "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return 8 + len(text)


def files_of(places: dict[str, Place], now: dict[str, Place], rank: int) -> set[int]:
    """Ranks whose files a rank of another layout opens."""
    return {other for name, place in now.items() for other in places[name].ranks(*place.part(rank))}


def opened(folder: Path, places: dict[str, Place], rank: int, world: int) -> int:
    """How many files a rank opens that goes on at the layout it saved at."""
    found: set[str] = set()
    told = grouped([(dict.fromkeys(KINDS, torch.float32), places)])
    paths = [folder / file_name(number) for number in range(world)]

    def noting(path: Any, *arguments: Any, **more: Any) -> int:
        found.add(str(path))
        return real(path, *arguments, **more)

    real = os.open
    with patch("os.open", noting), Fragments(paths, places_of(told)) as fragments:
        for name, place in places.items():
            start, length = place.part(rank)
            if length:
                fragments.read("weight", name, start, min(length, 8))
    return len(found)


def rows(worlds: tuple[int, ...]) -> list[dict[str, Any]]:
    """For ZeRO 1 and 3 and numbers of ranks: bytes of the manifest and of headers, files opened."""
    elements = lengths()
    found = []
    for stage in (1, 3):
        for world in worlds:
            places = laid_out(stage, world, elements)
            files = {
                file_name(rank): {"bytes": 10**11 // world, "sha256": "0" * 64}
                for rank in range(world)
            }
            told = grouped([(dict.fromkeys(KINDS, torch.float32), places)])
            with TemporaryDirectory() as folder:
                header = write_sparse(Path(folder), places, world // 2)
                same = opened(Path(folder), places, world // 2, world)
            fewer = max(1, 3 * world // 4)
            now = laid_out(stage, fewer, elements)
            others = [len(files_of(places, now, rank)) for rank in range(fewer)]
            hashed = max(len(own_files(files, rank, world)) for rank in range(world))
            found.append(
                {
                    "stage": stage,
                    "ranks": world,
                    "manifest": len(seal({"format": FORMAT, "files": files, "ranges": told})),
                    "header": header,
                    "hashed": hashed * 12 * sum(elements.values()) / world,
                    "opened": same,
                    "opened_before": world,
                    "headers_before": world * header,
                    "fewer": fewer,
                    "opened_by_fewer": max(others),
                }
            )
    return found


if __name__ == "__main__":
    for row in rows((1, 8, 64, 1024)):
        print(json.dumps(row))
