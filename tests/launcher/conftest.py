"""A small dataset, a configuration to train on it, and stand-ins for SLURM's commands."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import shards


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = [f"value_{i} = function_{i % 7}({i})" for i in range(200)]
    (folder / "lines.txt").write_text("\n".join(lines) + "\n")
    shards.build(
        folder / "lines.txt",
        folder / "lines",
        tokenizer="byte",
        max_length=40,
        valid_fraction=0.1,
    )
    return folder / "lines"


@pytest.fixture
def config_file(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tiny.yaml in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "tiny.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "data": {"shards": str(dataset), "global_batch_size": 8},
                "model": {
                    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
                    "latent_size": 8,
                    "token_size": 4,
                },
                "train": {"steps": 3, "precision": "fp32"},
                "log": {"every": 1},
            }
        )
    )
    return file


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a shell script in place of a command; each is found before the machine's own."""
    folder = tmp_path / "stand-ins"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def make(command: str, script: str) -> Path:
        file = folder / command
        file.write_text(f"#!/bin/bash\n{script}\n")
        file.chmod(0o755)
        return file

    return make


@pytest.fixture
def slurm(stand_in):
    """sbatch that takes every job as number 77, and a queue that does not know it."""
    stand_in("srun", "exit 1")
    stand_in("sbatch", "echo Submitted batch job 77")
    stand_in("squeue", "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")
    return stand_in
