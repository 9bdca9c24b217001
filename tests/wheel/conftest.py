"""The wheel, built once, and environments with nothing but it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TINY = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}


@dataclass
class Place:
    """An environment, and a working folder outside any checkout.

    Attributes:
        environment: the environment's folder.
        folder: where commands run. It has folders called as our packages are, which hide none.
    """

    environment: Path
    folder: Path

    def run(
        self, command: str, *arguments: object, **variables: str
    ) -> subprocess.CompletedProcess:
        """One of the environment's programs, or of the machine's."""
        program = self.environment / "bin" / command
        ours = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "SLURM_", "PYTHON", "T5VAE_", "VIRTUAL_")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        alone = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [program if program.exists() else command, *map(str, arguments)],
            cwd=self.folder,
            env={**inherited, **alone, **variables},
            capture_output=True,
            text=True,
        )

    def __call__(self, command: str, *arguments: object, **variables: str) -> str:
        """The standard output of a command that does well."""
        done = self.run(command, *arguments, **variables)
        assert done.returncode == 0, f"{command} {arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="session")
def distributions(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that is built from that."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", out, ROOT]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return out


@pytest.fixture(scope="session")
def install(distributions, tmp_path_factory) -> Callable[..., Place]:
    """Makes an environment with the pinned torch and the wheel."""
    (wheel,) = distributions.glob("*.whl")

    def make(
        *requirements: str, python: str = sys.executable, free: str = "", extras: str = ""
    ) -> Place:
        """With other packages than the pinned ones.

        Args:
            requirements: of pip, besides.
            python: the interpreter.
            free: packages that are not pinned, with | between.
            extras: of the wheel, as in [dev].
        """
        place = Place(*(tmp_path_factory.mktemp(name) for name in ("environment", "outside")))
        for package in ("shards", "launcher", "t5vae"):
            (place.folder / package).mkdir()
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        pinned = [line for line in lines if not re.match(rf"({free or 'nothing'})==", line)]
        constraints = place.environment / "constraints.txt"
        constraints.write_text("\n".join(pinned) + "\n")
        subprocess.run([python, "-m", "venv", place.environment], check=True)
        pip = ("pip", "install", "--quiet", "--no-compile", "--constraint", constraints)
        place(*pip, "torch")  # alone, as in the Makefile: what needs it takes what is there
        place(*pip, *requirements, f"{wheel}{extras}")
        return place

    return make


@pytest.fixture(scope="session")
def travel() -> Callable[[Place], None]:
    """What people do with an installed t5vae, without a checkout: from lines of text to samples."""

    def go(place: Place) -> None:
        lines = [f"value_{i} = function_{i % 7}({i})" for i in range(300)]
        (place.folder / "lines.txt").write_text("\n".join(lines) + "\n")
        own = {
            "data": {"shards": "data/lines", "global_batch_size": 16},
            "model": {"t5": TINY, "latent_size": 8, "token_size": 4},
            "train": {"steps": 4},
            "eval": {"every": 2, "decoded": 4, "check": "python"},
            "log": {"every": 1},
        }
        (place.folder / "own.yaml").write_text(yaml.safe_dump(own))
        how = ("--tokenizer", "byte", "--max-length", 32, "--valid-fraction", 0.2)
        place("t5vae", "shards", "build", "lines.txt", "--out", "data/lines", *how)
        place("t5vae", "train", "own.yaml", "--ranks", 2)
        saved = place.folder / "runs/own/checkpoints/step-00000004/manifest.json"
        assert json.loads(saved.read_text())["layout"]["world_size"] == 2
        place("t5vae", "export", "--finished", "runs/own")
        few = ("--sequences", 20, "--samples", 20, "--interpolations", 2)
        assert "exact" in place("t5vae", "eval", "runs/own", *few)
        assert len(place("t5vae", "sample", "runs/own", "-n", 3).splitlines()) == 3
        assert "micro batch" in place("t5vae", "plan", "own.yaml", "--gpu-memory", 80)

    return go
