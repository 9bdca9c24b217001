"""Runs made up of their metrics alone."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.failing import failing  # noqa: F401
from tests.small_runs import dataset, make_config, python_lines  # noqa: F401

NOW = 2_000_000_000.0  # Unix seconds


@pytest.fixture
def lines() -> Callable[..., list[dict[str, Any]]]:
    """Makes the lines of a run: one every 10 steps and 2 seconds, evaluated every 100 steps."""

    def make(count: int = 50, *, steps: int = 1000, ended: float = NOW) -> list[dict[str, Any]]:
        made = []
        for number in range(1, count + 1):
            step = 10 * number
            nats = 1 + 4 * math.exp(-step / 200)
            line: dict[str, Any] = {
                "step": step,
                "steps": steps,
                "time": ended - 2.0 * (count - number),
                "loss": nats + 0.1,
                "nats_per_token": nats,
                "mmd": 0.2 * math.exp(-step / 50) - 0.001,
                "consumed": 64 * step,
                "tokens_per_second": 1500.0,
                "checkpoint": step - step % 200,
            }
            if step % 100 == 0:
                line |= {"eval/nats_per_token": nats + 0.5, "eval/valid": 0.4}
            made.append(line)
        return made

    return make


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    """Writes lines, or any bytes, as the metrics of a run."""

    def make(name: str, content: list[dict[str, Any]] | bytes) -> Path:
        run = tmp_path / name
        run.mkdir(parents=True)
        if not isinstance(content, bytes):
            content = "".join(json.dumps(line) + "\n" for line in content).encode()
        (run / "metrics.jsonl").write_bytes(content)
        return run

    return make
