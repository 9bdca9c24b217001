"""The errors a user can mend, and what any error says."""

import errno
import os
import unicodedata
from collections.abc import Iterable

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
CONTROL = {"Cc", "Cs", "Zl", "Zp"}  # Unicode's classes: control, half a pair, line, paragraph


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    reason = getattr(error, "strerror", None) or str(error)
    return reason.strip().partition("\n")[0] or type(error).__name__


def printable(text: str, kept: str = "") -> str:
    """A text with its control characters, and what no encoding has, as Python writes them.

    Terminals obey control characters, and texts and names may be a stranger's.

    Args:
        text: the text.
        kept: control characters that stay: line breaks, say.
    """
    return "".join(
        each
        if each in kept or unicodedata.category(each) not in CONTROL
        else each.encode("unicode_escape").decode()
        for each in text
    )


class UserError(Exception):
    """A user's mistake: one line that says what is wrong, where, and how to mend it."""


class StorageError(Exception):
    """Storage that did not answer for minutes: no damage, no user's mistake, and worth a retry.

    Attributes:
        requeue: whether a job that it ended may be run again.
    """

    requeue = True


def check_arguments(arguments: Iterable[str]) -> None:
    """Refuse arguments that are no text: bytes that are not UTF-8 come as halves of pairs.

    Raises:
        UserError: for the first of them.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(argument).decode(errors="backslashreplace")
            raise UserError(
                f"the argument '{shown}' is not UTF-8: type it so, or rename the file that it names"
            ) from None


class DamageError(UserError):
    """A stored block is not what the index says it is; the line names shard and block."""
