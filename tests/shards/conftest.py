"""Small datasets for the tests of shards."""

import ast
import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shards
from tests.shards.site import Site, serving

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


@pytest.fixture(scope="session")
def parts(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus in files of 100 lines, each line twice in all."""
    folder = tmp_path_factory.mktemp("parts")
    lines = corpus.read_text().splitlines()
    for number in range(20):
        some = lines[number % 10 * 100 :][:100]
        (folder / f"{number:02}.txt").write_text("\n".join(some))
    return folder


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand lines make many groups, runs and buckets."""
    monkeypatch.setattr("shards.write.stages.LEAST_GROUP", 2000)
    monkeypatch.setattr("shards.write.spool.RUN_BYTES", 2000)
    monkeypatch.setattr("shards.write.spool.BUCKET_BYTES", 1500)
    monkeypatch.setattr("shards.write.stages.BATCH_BYTES", 300)


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], dict[str, str]]:
    """The sha256 of each file of a dataset folder, but for the stamp of when its input was made."""

    def of(folder: Path) -> dict[str, str]:
        files = [path for path in folder.rglob("[!.]*") if path.is_file()]
        assert {"index.json", "blocks.npy", "train-00000.tar"} <= {path.name for path in files}
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        }

    return of


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node's cache."""
    monkeypatch.setenv("T5VAE_CACHE", str(tmp_path / "node"))
    monkeypatch.setattr("t5vae.common.storage.SHORTEST", 0.01)
    return tmp_path / "node"


@pytest.fixture
def site(dataset: Path, tmp_path: Path, node: Path) -> Iterator[Site]:
    """A copy of the dataset on a web server."""
    with serving(Path(shutil.copytree(dataset, tmp_path / "site"))) as site:
        yield site
