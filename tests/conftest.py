"""The launcher of ranks that the packages' distributed tests share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run_ranks():
    """Start a test's own file once for each rank, with the rank and a folder as its arguments."""

    def run(file: str, world: int, folder: Path, **environment: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
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
