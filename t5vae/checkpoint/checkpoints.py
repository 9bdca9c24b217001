"""A run's checkpoints while it trains: begun, committed, and thinned out; all ranks together."""

from pathlib import Path
from typing import Any

from t5vae.checkpoint import retention
from t5vae.checkpoint.saving import FAILURES, Saver
from t5vae.cluster.errors import SharedError, SharedStorageError
from t5vae.cluster.phases import phase
from t5vae.common.errors import DISK_FULL, StorageError, first_line
from t5vae.config import Checkpoint
from t5vae.metrics.runlog import RunLog


class Checkpoints:
    """Saves a run's checkpoints as its configuration asks.

    Args:
        folder: `checkpoints/` of the run.
        settings: how they are saved, and which are kept.
        of_run: what every manifest says of the run.
        log: told of them; it is rank 0's that deletes old ones.
    """

    def __init__(self, folder: Path, settings: Checkpoint, of_run: dict[str, Any], log: RunLog):
        self.saver = Saver(folder, asynchronous=settings.asynchronous)
        self.settings, self.of_run, self.log = settings, of_run, log

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write of the checkpoint that was begun."""
        return self.saver.written

    def save(self, engine: Any, step: int, state: dict[str, Any], *, last: bool) -> None:
        """Save a step; where saves are asynchronous and it is not the last, only begin to.

        Args:
            engine: DeepSpeed's.
            step: steps done.
            state: what the manifest says of it besides.
            last: none will follow, so this one must succeed.

        Raises:
            SharedError: if it cannot be saved, and that ends the run.
            SharedStorageError: likewise, where the storage failed for minutes.
        """
        with phase("save"):
            self.commit(True)
            self.saver.start(engine, step, self.of_run | state)
            self.commit(last or not self.settings.asynchronous, last=last)

    def commit(self, written: bool, *, last: bool = False) -> None:
        """Commit the checkpoint that was begun, if there is one and all ranks have written it.

        Args:
            written: whether they have, or are to be waited for.
            last: none will follow.

        Raises:
            SharedError, SharedStorageError: as `save`.
        """
        saver = self.saver
        if not (written and saver.pending):
            return
        try:
            saved = saver.finish()
        except FAILURES as error:
            failed = f"{saver.target.name} could not be saved ({first_line(error)})"
            if last or self.settings.on_error == "stop":
                raise self._end(error, failed) from None
            self.log.say(f"{failed}; training goes on without it")
            return
        if self.log.enabled:
            retention.retain(
                saver.folder,
                self.log.say,
                last=self.settings.keep_last,
                every=self.settings.keep_every,
                best=self.settings.keep_best,
            )
        self.log.saved(
            f"saved {saved.path} ({saved.bytes / 1e6:,.1f} MB in {saved.seconds:.2f} s, training "
            f"waited {saved.stall:.2f} s)",
            step=retention.step_of(saved.path),
            seconds=saved.seconds,
            stall=saved.stall,
        )

    def _end(self, error: Exception, failed: str) -> Exception:
        """What ends the run where a save failed."""
        if isinstance(error, StorageError):
            return SharedStorageError(f"{failed}; the checkpoints before it are untouched")
        full = isinstance(error, OSError) and error.errno in DISK_FULL
        mend = "free some space" if full else f"make {self.saver.folder} writable"
        return SharedError(
            f"{failed}; the checkpoints before it are untouched: {mend} and run the same command "
            "again"
        )

    def close(self) -> None:
        self.saver.close()
