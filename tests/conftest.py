"""What all tests share: one thread a process, no network, a launcher of ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Before torch and transformers are imported. Tiny models gain nothing from threads, which wait for
# each other where other programs run; a forgotten download fails at once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def run_ranks():
    """Start a test's own file once for each rank, with the rank and a folder as its arguments."""

    def run(file: str, world: int, folder: Path, **environment: str) -> None:
        environment = {**os.environ, **environment}
        if sys.platform == "linux":  # elsewhere the loopback has another name
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        ranks = [
            subprocess.Popen(
                [sys.executable, file, str(rank), str(folder)],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        try:
            errors = [rank.communicate(timeout=120)[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert all(rank.returncode == 0 for rank in ranks), "\n".join(errors)[-3000:]

    return run
