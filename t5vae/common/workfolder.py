"""The folder in which a build keeps what is done, so that the same command goes on after a halt."""

import fcntl
import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from t5vae.common.errors import DISK_FULL, UserError
from t5vae.common.progress import say


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
