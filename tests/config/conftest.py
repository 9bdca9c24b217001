"""A configuration file to write."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a configuration file and return its path."""

    def write_config(text: str = "data: {shards: data/lines}\n") -> Path:
        path = tmp_path / "small.yaml"
        path.write_text(text)
        return path

    return write_config
