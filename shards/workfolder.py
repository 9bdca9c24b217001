"""The folder in which a build keeps what is done, so that the same command goes on after a halt."""

import fcntl
import json
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.errors import DISK_FULL, UserError
from shards.progress import say
from shards.workers import finished


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """Make `.NAME.build` beside `out`, or take it up again, for this process alone.

    It is removed at the end and after a UserError; whatever else halts a build leaves it.

    Raises:
        UserError: another process has it, no space is left, a worker died, or nothing can be
            written there.
    """
    place = out.resolve()
    folder = place.with_name(f".{place.name}.build")
    go_on = f"run the same command again to go on, or remove {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is building {out}: wait for it") from None
            try:
                yield folder
            except UserError:
                shutil.rmtree(folder)
                raise
            shutil.rmtree(folder)
    except KeyboardInterrupt:
        say(f"stopped: {go_on}")
        raise
    except BrokenProcessPool:
        raise UserError(
            f"a worker died, perhaps for want of memory: choose fewer --workers and {go_on}"
        ) from None
    except OSError as error:
        if error.errno in DISK_FULL:
            raise UserError(f"no space left for {out}: make room and {go_on}") from None
        raise UserError(f"cannot write {out}: {error}") from None


def copy_stdin(folder: Path) -> Path:
    """Copy standard input into a file, to be read as often as need be."""
    with open(folder / "stdin", "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return folder / "stdin"


def take_up(parts: Path, recipe: dict[str, Any]) -> None:
    """Keep in the folder `parts` what a halted build of the same recipe left, and nothing else."""
    file, content = parts / "recipe.json", json.dumps(recipe, indent=1)
    if file.is_file() and file.read_text() == content:
        stages = {"read": "reading", "cut": "cutting", "tokens": "tokenizing"}
        counts = {what: len(finished(parts / name)) for name, what in stages.items()}
        done = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        say(f"going on with a halted build (tasks done: {done or 'none'})")
        return
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir()
    file.write_text(content)
