"""Links in a folder that can come from anybody: none may lead what is written there elsewhere."""

import os
from collections.abc import Iterator
from pathlib import Path

from t5vae.common.errors import UserError
from t5vae.common.storage import patiently


def refuse_links(folder: Path, *names: str) -> None:
    """Refuse to write into a folder with a symbolic link out of it; it may itself be one.

    The folders in `wandb`, which makes links to its logs, are not looked into.

    Args:
        folder: that is going to be written into.
        names: what in it is; none for all.

    Raises:
        UserError: naming such a link.
        StorageError: the storage failed for minutes.
    """
    home = os.path.realpath(folder)
    for link in patiently(lambda: list(_links(home, names)), str(folder)):
        target = os.path.realpath(link)
        if not target.startswith(os.path.join(home, "")):
            raise UserError(
                f"{folder / os.path.relpath(link, home)} is a link to {target}, and {folder} can "
                "come from anybody, so nothing is written outside of it: put what the link leads "
                "to in its place, or let the whole folder lie elsewhere"
            )


def _links(folder: str, names: tuple[str, ...]) -> Iterator[str]:
    def give_up(error: OSError) -> None:
        # Nothing may be there yet, or it was removed just now.
        if not isinstance(error, FileNotFoundError):
            raise error

    for parent, folders, files in os.walk(folder, onerror=give_up):
        if parent == folder and names:
            folders[:], files = [[n for n in found if n in names] for found in (folders, files)]
        for name in (*folders, *files):
            if os.path.islink(path := os.path.join(parent, name)):
                yield path
        if parent == os.path.join(folder, "wandb"):
            folders.clear()
