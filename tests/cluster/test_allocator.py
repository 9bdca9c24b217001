"""Memory that a process frees stays with it."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy
from t5vae.cluster.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    blocks = [numpy.ones(2**21, dtype=numpy.float32) for _ in range(3)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    """Of a process that makes and frees three arrays of 8 MiB twenty times."""
    command = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone is asked")
def test_pages_of_large_arrays_are_touched_for_the_first_time_once():
    assert page_faults("kept") < page_faults("as ever") / 4
