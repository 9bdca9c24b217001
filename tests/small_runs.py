"""A small dataset, configurations to train on it, and ranks without a process group."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import shards
from t5vae.checkpoint import fragments, resuming, saving, verifying
from t5vae.cluster import agreement
from t5vae.config import Config
from t5vae.training.anomalies import Anomalies

T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
MODEL = {"t5": T5, "latent_size": 8, "token_size": 4}


@pytest.fixture(scope="session")
def python_lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 unique lines of Python."""
    path = tmp_path_factory.mktemp("corpus") / "lines.txt"
    texts = [f"value_{i} = function_{i % 7}({', '.join('abcdef'[: i % 6])})" for i in range(400)]
    path.write_text("\n".join(texts) + "\n")
    return path


@pytest.fixture(scope="session")
def dataset(python_lines: Path) -> Path:
    """About 360 train and 40 valid sequences. Not to be changed."""
    folder = python_lines.parent / "dataset"
    shards.build(
        python_lines,
        folder,
        tokenizer="train:300",
        max_length=24,
        valid_fraction=0.1,
        block_size=32,
    )
    return folder


@pytest.fixture(scope="session")
def other_dataset(python_lines: Path) -> Path:
    """The same lines with another tokenizer."""
    folder = python_lines.parent / "other"
    shards.build(
        python_lines, folder, tokenizer="byte", max_length=48, valid_fraction=0.1, block_size=32
    )
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
            "train": {"steps": 10, "precision": "bf16"},
        }
        return Config(**{**whole, **sections})

    return make


class Together:
    """Ranks as threads of this process, with what the product asks of torch.distributed."""

    def __init__(self, world: int):
        self.world, self.own = world, threading.local()
        self.said: list[Any] = [None] * world
        self.barrier = threading.Barrier(world, timeout=60).wait

    def run(self, call: Callable[[int], Any]) -> list[Future[Any]]:
        """Call it once for each rank, all at the same time, and wait for them."""

        def rank_main(rank: int) -> Any:
            self.own.rank = rank
            return call(rank)

        with ThreadPoolExecutor(self.world) as threads:
            return [threads.submit(rank_main, rank) for rank in range(self.world)]

    def is_initialized(self) -> bool:
        return False

    def get_rank(self) -> int:
        return getattr(self.own, "rank", 0)

    def get_world_size(self) -> int:
        return self.world

    def all_gather_object(self, found: list[Any], own: Any, group: None = None) -> None:
        self.said[self.get_rank()] = own
        self.barrier()
        found[:] = self.said
        self.barrier()

    def broadcast_object_list(self, found: list[Any], src: int, group: None = None) -> None:
        everyone: list[Any] = [None] * self.world
        self.all_gather_object(everyone, list(found))
        found[:] = everyone[src]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Together]:
    """Makes this many ranks of this process, in place of a process group."""

    def make(world: int) -> Together:
        ranks = Together(world)
        for module in (agreement, fragments, resuming, saving, verifying):
            monkeypatch.setattr(module, "dist", ranks)
        return ranks

    return make


def _muon(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    weights = list(parameters)
    matrices = {"params": [w for w in weights if w.ndim == 2], "use_muon": True}
    others = {"params": [w for w in weights if w.ndim != 2], "use_muon": False}
    return MuonWithAuxAdam([matrices, others])


@pytest.fixture(scope="session")
def make_engine() -> Callable[..., Any]:
    """Makes what stands in for DeepSpeed's engine at stage 0: parameters of 1 to 21 elements."""

    def make(optimizer: str = "adamw", *, seed: int = 0, steps: int = 1) -> Any:
        with torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 5), nn.Linear(5, 1))
            base = (_muon if optimizer == "muon" else torch.optim.AdamW)(model.parameters())
            for _ in range(steps):
                base.zero_grad()
                model(torch.arange(7)).square().sum().backward()
                base.step()
        return SimpleNamespace(module=model, optimizer=base, zero_optimization_stage=lambda: 0)

    return make


@pytest.fixture
def save(
    together: Callable[[int], Together], make_engine: Callable[..., Any]
) -> Callable[..., Path]:
    """Saves a real checkpoint, without DeepSpeed or a process group."""

    def save_step(
        folder: Path,
        step: int,
        identity: dict[str, Any] | None = None,
        engine: Any = None,
        *,
        world: int = 1,
        **more: Any,
    ) -> Path:
        engine = engine or make_engine()
        layout = {"mmd_batch": 16, "zero_stage": 0, "precision": "fp32"}
        manifest = {
            "layout": {"world_size": world, **layout},
            "data": {"consumed": step * 16},
            "watch": Anomalies(0, 0.0).state_dict(),
            "held_out": None,
            "weights_from": None,
        }

        def save_rank(rank: int) -> Path:
            saver = saving.Saver(folder, asynchronous=False)
            saver.start(engine, step, {**manifest, **(identity or {}), **more})
            try:
                return saver.finish().path
            finally:
                saver.close()

        return together(world).run(save_rank)[0].result()

    return save_step
