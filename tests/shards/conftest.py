"""Small datasets for the tests of shards."""

import ast
from pathlib import Path

import pytest

import shards

MAX_LENGTH = 24


def statements(count: int) -> list[str]:
    """Unique lines of Python with a range of lengths."""
    lines = [f"value_{i} = function_{i % 7}({', '.join('abcdef'[: i % 6])})" for i in range(count)]
    for line in lines:
        ast.parse(line)
    return lines


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "lines.txt"
    path.write_text("\n".join(statements(1000)) + "\n")
    return path


@pytest.fixture(scope="session")
def dataset(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 900 train sequences in blocks of 32, over several shards. Not to be changed."""
    path = tmp_path_factory.mktemp("data") / "small"
    shards.build(
        corpus,
        path,
        tokenizer="train:300",
        max_length=MAX_LENGTH,
        valid_fraction=0.1,
        block_size=32,
        shard_size=8192,
    )
    return path
