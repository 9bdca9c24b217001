"""A small dataset, configurations to train on it, and a process group of one without gloo."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import shards
from t5vae.config import Config
from t5vae.training import checkpoint

T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
MODEL = {"t5": T5, "latent_size": 8, "token_size": 4}


@pytest.fixture(scope="session")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 unique lines of Python."""
    path = tmp_path_factory.mktemp("corpus") / "lines.txt"
    texts = [f"value_{i} = function_{i % 7}({', '.join('abcdef'[: i % 6])})" for i in range(400)]
    path.write_text("\n".join(texts) + "\n")
    return path


@pytest.fixture(scope="session")
def dataset(lines: Path) -> Path:
    """About 360 train and 40 valid sequences. Not to be changed."""
    folder = lines.parent / "dataset"
    shards.build(
        lines, folder, tokenizer="train:300", max_length=24, valid_fraction=0.1, block_size=32
    )
    return folder


@pytest.fixture(scope="session")
def other_dataset(lines: Path) -> Path:
    """The same lines with another tokenizer."""
    folder = lines.parent / "other"
    shards.build(lines, folder, tokenizer="byte", max_length=48, valid_fraction=0.1, block_size=32)
    return folder


@pytest.fixture(scope="session")
def damaged_dataset(dataset: Path) -> Path:
    """Other lines with the tokenizer of `dataset`; one bit of its first block is wrong."""
    lines, folder = dataset.parent / "others.txt", dataset.parent / "damaged"
    lines.write_text("\n".join(f"other_{i} = {i} + {'x' * (i % 5)}" for i in range(300)))
    options = {"max_length": 16, "valid_fraction": 0.1, "block_size": 32}
    index = shards.build(lines, folder, tokenizer=dataset / "tokenizer", **options)
    shard = folder / index.shards[0].name
    content = bytearray(shard.read_bytes())
    content[index.blocks[0]["tokens_offset"]] ^= 1
    shard.write_bytes(content)
    return folder


@pytest.fixture
def make_config(dataset: Path, tmp_path: Path) -> Callable[..., Config]:
    """A small run's configuration; sections given replace its own."""

    def make(**sections: dict[str, Any]) -> Config:
        whole = {
            "run": {"name": "small", "output_dir": str(tmp_path / "run")},
            "data": {"shards": str(dataset), "global_batch_size": 16},
            "model": MODEL,
            "train": {"steps": 10},
        }
        return Config(**{**whole, **sections})

    return make


@pytest.fixture
def save(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Saves a real checkpoint, without DeepSpeed or a process group.

    `write(folder)` stands in for DeepSpeed's writer, and writes what it likes under `folder`.
    """

    def gather(reports: list, own: Any) -> None:
        reports[0] = own

    alone = SimpleNamespace(
        get_rank=lambda: 0,
        get_world_size=lambda: 1,
        barrier=lambda: None,
        all_gather_object=gather,
        broadcast_object_list=lambda found, src: None,
    )
    monkeypatch.setattr(checkpoint, "dist", alone)

    def weights(folder: Path) -> None:
        folder.mkdir()
        (folder / "weights.pt").write_bytes(bytes(range(256)) * 4)
        (folder / "optimizer.pt").write_bytes(b"moments" * 100)

    def save_step(
        folder: Path,
        step: int,
        identity: dict[str, Any] | None = None,
        write: Callable[[Path], None] = weights,
    ) -> Path:
        engine = SimpleNamespace(checkpoint_engine=SimpleNamespace(save=write))
        engine.save_checkpoint = lambda path, tag, save_latest: engine.checkpoint_engine.save(
            Path(path) / tag
        )
        data = {"consumed": step * 16}
        return checkpoint.save(folder, engine, step=step, data=data, identity=identity or {})

    return save_step


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Gives the signals back that a test takes over."""
    numbers = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
