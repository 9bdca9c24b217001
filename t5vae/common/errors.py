"""The errors a user can mend, and what any error says."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    reason = getattr(error, "strerror", None) or str(error)
    return reason.strip().partition("\n")[0] or type(error).__name__


class UserError(Exception):
    """A user's mistake: one line that says what is wrong, where, and how to mend it."""


class DamageError(UserError):
    """A stored block is not what the index says it is; the line names shard and block."""
