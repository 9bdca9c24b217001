"""Parts of a build: each made on its own, by any machine that has the folder, and then joined.

They lie in `.NAME.parts` beside the dataset NAME, not in `.NAME.build`, which one process has. Part
K of N is a folder `K-of-N`: what a build has on its way, up to the end of the first stage that
tokenizes. Where that stage gives items other keys they may belong to other parts, so the rest is
left to `join`.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from shards.write.corpora import File, combine
from shards.write.options import Options, Part, difference
from shards.write.pipeline import Pipeline
from shards.write.spool import Spool
from shards.write.stages import EQUAL
from t5vae.common.errors import UserError
from t5vae.common.files import fsync, write_whole
from t5vae.common.owners import is_mine

PART = "part.json"
COUNTS = ("read", "cut", "encoded", "tokenized", "merged")


def folder_of_parts(out: Path) -> Path:
    """Where the parts of a dataset lie."""
    place = out.resolve()
    return place.with_name(f".{place.name}.parts")


@contextmanager
def have_parts(out: Path) -> Iterator[None]:
    """Leave no folder of parts that has none."""
    try:
        yield
    finally:
        with suppress(OSError):
            folder_of_parts(out).rmdir()


def finish_part(pipeline: Pipeline, place: Path, recipe: dict[str, Any], files: list[File]) -> None:
    """Move what a pipeline made to the place of its part, where it appears whole."""
    root = pipeline.folder
    document = {
        "folder": os.stat(root).st_ino,
        "recipe": recipe,
        "options": asdict(pipeline.options),
        "kind": pipeline.kind,
        "input": [astuple(file) for file in files],
        "tokens": [str(path.relative_to(root)) for path in pipeline.tokens],
        **{name: getattr(pipeline, name) for name in COUNTS},
    }
    if not pipeline.tokenized:
        spool = pipeline.spool
        document["spool"] = {
            "runs": [str(path.relative_to(root)) for path in spool.runs],
            "kind": spool.kind,
            "items": spool.items,
            "buckets": spool.buckets,
        }
    write_whole(root / PART, json.dumps(document))
    for path in [*(root / "tokenizer").iterdir(), root / PART, root]:
        fsync(path)
    os.rename(root, place)
    fsync(place.parent)


def read_part(place: Path) -> dict[str, Any] | None:
    """What is noted of a part; None where there is none."""
    try:
        document: dict[str, Any] = json.loads((place / PART).read_bytes())
        moved = document["folder"] != os.stat(place).st_ino or not is_mine(place)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):
        moved = True
    if moved:
        raise UserError(f"{place} was made elsewhere: remove it, and build that part here")
    return document


def read_parts(out: Path) -> list[tuple[Path, dict[str, Any]]]:
    """All parts of a dataset in their order, and what is noted of each.

    Raises:
        UserError: some are missing, or do not belong together.
    """
    home = folder_of_parts(out)
    names = [path.name.split("-of-") for path in home.glob("[0-9]*-of-*")]
    counts = sorted({int(of) for _, of in names})
    if not counts:
        raise UserError(f"{out} has no parts to join: build them (t5vae shards build --part K/N)")
    if len(counts) > 1:
        raise UserError(f"{home} has parts of {' and of '.join(map(str, counts))}: remove some")
    places = [home / str(Part(number + 1, counts[0])) for number in range(counts[0])]
    parts = [(place, document) for place in places if (document := read_part(place))]
    there = {place for place, _ in parts}
    missing = [str(number + 1) for number, place in enumerate(places) if place not in there]
    if missing:
        raise UserError(
            f"{out} lacks part {', '.join(missing)} of {counts[0]}: build it with --part "
            f"{missing[0]}/{counts[0]}, then join"
        )
    first = _made_from(parts[0][1])
    for place, document in parts[1:]:
        if differs := difference(_made_from(document), first):
            raise UserError(
                f"{place} and {places[0].name} do not go together: it was built with {differs}; "
                "remove one of them, and build that part again"
            )
    return parts


def _made_from(document: dict[str, Any]) -> dict[str, Any]:
    digests = [digest for done in document["read"] for digest in done["digests"]]
    return {**document["recipe"], "input": document["input"], "sha256": combine(digests)}


def join_parts(folder: Path, parts: list[tuple[Path, dict[str, Any]]], workers: int) -> Pipeline:
    """A pipeline in `folder` that goes on where the parts ended; it leaves them as they are."""
    documents = [document for _, document in parts]
    first = documents[0]
    pipeline = Pipeline(folder, first["kind"], Options(**first["options"]), workers, keep=True)
    pipeline.read = [
        *first["read"],
        *(_of_share(done) for d in documents[1:] for done in d["read"]),
    ]
    for name in ("cut", "encoded", "tokenized"):
        setattr(pipeline, name, [done for document in documents for done in document[name]])
    for place, document in parts:
        pipeline.merged.update(document["merged"])
        pipeline.tokens += [place / path for path in document["tokens"]]
    if not pipeline.tokens:
        spools = [document["spool"] for document in documents]
        spool = Spool(
            [place / path for place, document in parts for path in document["spool"]["runs"]],
            spools[0]["kind"],
            pipeline.options.dedupe,
            sum(spool["items"] for spool in spools),
            sum(spool["buckets"] for spool in spools),
        )
        pipeline.take(spool, "joined", pipeline.equal)
    return pipeline


def _of_share(done: dict[str, Any]) -> dict[str, Any]:
    """The counts of a reading, less what every part counts of the whole corpus."""
    duplicates = done["spool"].get("duplicates", 0)
    return done | {"texts": 0, "digests": [], "dropped": {EQUAL: duplicates}}
