"""The C library's allocator, for a process that makes and frees the same tensors in every step."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST = 32 * 2**20  # bytes, the most that glibc allows


def keep_freed_memory() -> None:
    """Give large tensors' memory back to the allocator when freed, not to the system.

    glibc maps large blocks anew each time, and Linux then zeroes every page at its first touch: a
    fifth of a small model's step. Where the C library is another one nothing changes.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
