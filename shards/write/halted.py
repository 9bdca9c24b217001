"""What a halted build left: taken up where it is of use, removed where it is of none."""

import json
import shutil
from pathlib import Path
from typing import Any

from shards.write.corpora import BAD_ROW, File
from shards.write.spool import run_path
from shards.write.stages import group_files
from shards.write.workers import finished
from t5vae.common.files import write_whole
from t5vae.common.progress import say
from t5vae.common.storage import patiently

RECIPE = "recipe.json"
READ = "read"
OF_READING = (
    "version",
    "format",
    "column",
    "seed",
    "dedupe",
    "part",
)  # and the files, decide what is read
OF_TOKENS = ("tokenizer",)
STAGES = {READ: "reading", "cut": "cutting", "encoded": "encoding", "tokens": "tokenizing"}


def is_of_use(work: Path) -> bool:
    """Whether a work folder holds finished tasks of a known recipe."""
    parts = work / "parts"
    return _text(parts / RECIPE) != "" and any(finished(parts / stage) for stage in STAGES)


def forget(parts: Path) -> None:
    """Let no build use what lies in a folder, of which some may be gone."""
    (parts / RECIPE).unlink()


def take_up(parts: Path, recipe: dict[str, Any], kind: str) -> None:
    """Keep in a folder what a halted build left that this one would make again; nothing else.

    Of another recipe's that is what was read of groups of files that are the same.

    Args:
        parts: the folder.
        recipe: what the build is made from; "input" are its files, of a pipe the sha256.
        kind: of the corpus's sequences.
    """
    file, content = parts / RECIPE, json.dumps(recipe, indent=1)
    before = patiently(lambda: _text(file), str(file))
    if before == content:
        counts = {what: len(finished(parts / name)) for name, what in STAGES.items()}
        done = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        say(f"going on with a halted build (tasks done: {done or 'none'})")
        return
    kept: set[int] = set()
    if before:
        kept = _same_readings(parts / READ, json.loads(before), json.loads(content), kind)
        forget(parts)
    parts.mkdir(exist_ok=True)
    for path in parts.iterdir():
        if kept and path.name == READ:
            _remove_tasks(path, kept)
        else:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_whole(file, content)
    if kept:
        say(f"going on with what a halted build has read (tasks done: {len(kept):,} reading)")


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


def _same_readings(
    folder: Path, before: dict[str, Any], now: dict[str, Any], kind: str
) -> set[int]:
    """The tasks of another recipe's reading that are this one's too, and whole."""
    inputs = before["input"], now["input"]
    named = all(isinstance(file, list) for files in inputs for file in files)
    of_reading = OF_READING + OF_TOKENS * (kind == "tokens")
    if not named or any(before.get(name) != now.get(name) for name in of_reading):
        return set()
    old, new = (group_files([File(*file) for file in files]) for files in inputs)
    same_rows = before.get("bad_rows") == now.get("bad_rows")
    done = finished(folder)
    there = set(folder.iterdir()) if done else set()
    return {
        task
        for task, counts in done.items()
        if old[task : task + 1] == new[task : task + 1]
        and (same_rows or not counts["dropped"].get(BAD_ROW))
        and all(run_path(folder, task, run) in there for run in range(counts["spool"]["runs"]))
    }


def _remove_tasks(folder: Path, kept: set[int]) -> None:
    for path in folder.iterdir():
        if int(path.name[:5]) not in kept:
            path.unlink()
