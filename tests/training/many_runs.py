"""Many small runs by one script, `_many_runs.py`, and what is left of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import shards
from t5vae.checkpoint import retention
from t5vae.metrics.reading import read_metrics
from tests.launching import TIMINGS

SCRIPT = Path(__file__).with_name("_many_runs.py")
SEQUENCES, BATCH = 360, 72
BASE = {
    "data": {"global_batch_size": BATCH},
    "model": {
        "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
        "latent_size": 8,
        "token_size": 4,
    },
    "objective": {"latent_noise": 0.5},
    "train": {"timeout": 60},
    "checkpoint": {"every": 0, "keep_last": 100},
    "log": {"every": 1},
}
SHARD_SMALL_ONES_TOO = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
STAGES = (0, 1, 2, 3)
Settings = dict[str, Any]


@pytest.fixture(scope="session")
def short_dataset(tmp_path_factory) -> Path:
    """Five global batches an epoch."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = (f"value_{i} = function_{i % 7}({', '.join('abcdef'[: i % 6])})" for i in range(360))
    (folder / "lines.txt").write_text("\n".join(texts) + "\n")
    options = {"max_length": 24, "valid_fraction": 0, "block_size": 32}
    shards.build(folder / "lines.txt", folder / "dataset", tokenizer="train:300", **options)
    return folder / "dataset"


class Folder(NamedTuple):
    """Where a fixture's runs are, and what their ranks saw."""

    path: Path

    def run(self, name: str, out: str, settings: Settings, **options: Any) -> dict[str, Any]:
        """A run for the ranks' script.

        Args:
            name: of this start of it.
            out: the run's own name: its folder.
        """
        settings = {"run.output_dir": str(self.path / out), **settings}
        if settings["deepspeed.zero_stage"] == 3:
            settings["deepspeed.config"] = {
                **SHARD_SMALL_ONES_TOO,
                **settings.get("deepspeed.config", {}),
            }
        given = [
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in settings.items()
        ]
        return {"name": name, "settings": given, **options}

    def start(self, dataset: Path, launches: list[tuple[int, list[dict[str, Any]]]]) -> None:
        """Start ranks for each (world size, runs); runs of ZeRO-3 leave traces, and come last."""
        base = {**BASE, "data": {**BASE["data"], "shards": str(dataset)}}
        (self.path / "base.yaml").write_text(yaml.safe_dump(base))
        ordered = [
            {
                "world": world,
                "runs": sorted(runs, key=lambda run: "deepspeed.zero_stage=3" in run["settings"]),
            }
            for world, runs in launches
        ]
        (self.path / "launches.json").write_text(json.dumps(ordered))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment |= {"TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
        if sys.platform == "linux":  # elsewhere the loopback has another name
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        command = [sys.executable, "-W", "ignore", str(SCRIPT), str(self.path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]

    def seen(self, name: str, world: int = 2) -> list[dict[str, Any]]:
        """What each rank saw of a start."""
        files = [self.path / f"{name}.{rank}.json" for rank in range(world)]
        return [json.loads(file.read_text()) for file in files]

    def metrics(self, out: str) -> list[dict[str, Any]]:
        """Every line without its timings."""
        lines = read_metrics(self.path / out)
        return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]

    def last(self, out: str) -> Path:
        return retention.list_checkpoints(self.path / out / "checkpoints")[-1]


def settings_of(stage: int, optimizer: str, precision: str, **others: Any) -> Settings:
    return {
        "deepspeed.zero_stage": stage,
        "optim.name": optimizer,
        "train.precision": precision,
        "optim.muon_precision": "fp32",
        **others,
    }
