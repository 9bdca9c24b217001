"""Files of checkpoints: reached again while the storage fails; what the user can mend is told."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from t5vae.common.errors import UserError, first_line
from t5vae.common.storage import patiently

ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""What says that something is not there."""

Result = TypeVar("Result")


def reach(path: Path, attempt: Callable[[], Result]) -> Result:
    """What an attempt returns, which opens afresh all that it needs.

    Args:
        path: what it is about.

    Raises:
        FileNotFoundError, NotADirectoryError, IsADirectoryError: it is not there.
        StorageError: the storage failed for minutes.
        UserError: it cannot be reached for another reason: no permission, say.
    """
    try:
        return patiently(attempt, str(path))
    except ABSENT:
        raise
    except OSError as error:
        raise UserError(f"cannot reach {path}: {first_line(error)}") from None


def exists(path: Path) -> bool:
    """Whether something is there.

    Raises:
        StorageError, UserError: as `reach`.
    """
    try:
        reach(path, path.stat)
    except ABSENT:
        return False
    return True


def names(folder: Path) -> list[str]:
    """What lies in a folder, in order; nothing where there is none.

    Raises:
        StorageError, UserError: as `reach`; a folder that does not answer is no empty one.
    """
    try:
        return sorted(reach(folder, lambda: [path.name for path in folder.iterdir()]))
    except ABSENT:
        return []


def move(source: Path, target: Path) -> None:
    """Give a file or folder a name that nothing has.

    Raises:
        StorageError: the storage failed for minutes.
        OSError: it cannot be renamed for another reason.
    """

    def attempt() -> None:
        try:
            source.rename(target)
        except FileNotFoundError:
            if not target.exists():  # as it is where a try that failed had done it
                raise

    patiently(attempt, str(source))


def free(folder: Path, candidates: Iterable[str]) -> Path:
    """The first of some names that nothing in a folder has.

    Raises:
        StorageError, UserError: as `reach`.
    """
    taken = set(names(folder))
    return folder / next(name for name in candidates if name not in taken)
