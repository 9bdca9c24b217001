"""Small runs, for tests of what is saved of them."""

import threading

import pytest

from t5vae.checkpoint import saving
from t5vae.checkpoint.rank_files import write
from tests.checkpoint.beginning import _own_generators, begin, other, run  # noqa: F401
from tests.failing import failing  # noqa: F401
from tests.small_runs import (  # noqa: F401
    damaged_dataset,
    dataset,
    make_config,
    make_engine,
    other_dataset,
    python_lines,
    save,
    together,
)


@pytest.fixture
def held(monkeypatch):
    """Writing waits until this is set."""
    gate = threading.Event()

    def wait_and_write(*args):
        assert gate.wait(60)
        return write(*args)

    monkeypatch.setattr(saving, "write", wait_and_write)
    yield gate
    gate.set()
