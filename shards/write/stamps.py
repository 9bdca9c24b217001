"""The stamp of a dataset's input: tells without reading it whether it is what was built from.

It is in the dataset's folder, since it is true of that dataset alone, and in a file of its own,
since the same input gives the same index wherever and whenever its files were written. It is a
hash, so that a dataset that is handed on tells no names of files. Where it is missing, or the input
was copied too, the input is hashed, as for datasets of an older version.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

from shards.write.corpora import File
from t5vae.common.files import head, write_whole

STAMP = ".source"


def write_stamp(folder: Path, files: list[File] | None) -> None:
    """Note what a dataset's files look like that it was built from, if that can be told."""
    stamp = _stamp(folder, files)
    if stamp:
        write_whole(folder / STAMP, stamp + "\n")


def note_stamp(folder: Path, files: list[File]) -> None:
    """The same, in a folder where nothing may be written."""
    with suppress(OSError):
        write_stamp(folder, files)


def is_unchanged(folder: Path, files: list[File]) -> bool:
    """Whether all files have the names, sizes and times that they had."""
    try:
        noted = head(folder / STAMP).decode(errors="replace").strip()
    except OSError:
        return False
    return noted != "" and noted == _stamp(folder, files)


def _stamp(folder: Path, files: list[File] | None) -> str:
    """Of files and an index; empty if one of the files has nothing that changes when it does."""
    if files is None or not all(file.stamp for file in files):
        return ""
    index = hashlib.sha256((folder / "index.json").read_bytes()).hexdigest()
    known = json.dumps([index, *map(astuple, files)])
    return hashlib.sha256(known.encode(errors="surrogateescape")).hexdigest()
