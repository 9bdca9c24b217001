"""The errors a user can mend."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """A user's mistake: one line that says what is wrong, where, and how to mend it."""


class DamageError(UserError):
    """A stored block is not what the index says it is; the line names shard and block."""
