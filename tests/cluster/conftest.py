"""A real SLURM of three hosts, a small run for it, and what its commands say."""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import shards
from tests.small_runs import dataset, make_config, python_lines, together  # noqa: F401

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "slurm" / "train.sh"
BIN = Path(sys.executable).parent
PATIENCE = 240  # seconds until something is given up, far more than anything needs
OF_SLURM = ("slurmd", "slurmstepd", "slurm_script", "srun")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="session")
def cluster() -> Iterator[ModuleType]:
    """The hosts, brought up for these tests, or those that are up already."""
    spec = importlib.util.spec_from_file_location("cluster", Path(__file__).with_name("cluster.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    was_up = module.is_up()
    try:
        module.packages()
        module.up()
    except module.RefusalError as error:
        pytest.skip(f"NOTHING WAS TRIED ON A CLUSTER: {error}")
    yield module
    if not was_up:
        module.down()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = [f"value_{i} = function_{i % 7}({i})" for i in range(400)]
    (folder / "lines.txt").write_text("\n".join(lines) + "\n")
    shards.build(folder / "lines.txt", folder / "lines", tokenizer="byte", max_length=40)
    return folder / "lines"


class Slurm:
    """SLURM's commands and ours, from a shell of a user in a folder of its own."""

    def __init__(self, folder: Path, corpus: Path):
        self.folder = folder
        self.config = folder / "tiny.yaml"
        t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        whole = {
            "data": {"shards": str(corpus), "global_batch_size": 8},
            "model": {"t5": t5, "latent_size": 8, "token_size": 4},
            "train": {"steps": 40, "precision": "fp32", "timeout": 15},
            "optim": {"muon_precision": "fp32"},
            "log": {"every": 1},
            "launcher": {"nodes": 2},
        }
        self.config.write_text(yaml.safe_dump(whole))

    def call(self, *command: object) -> subprocess.CompletedProcess:
        """Run a command in the folder, as from a shell of no virtual environment."""
        return subprocess.run(
            [str(part) for part in command],
            cwd=self.folder,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HF_HUB_OFFLINE": "1", "HOME": "/root"},
            capture_output=True,
            text=True,
        )

    def __call__(self, *command: object) -> str:
        """The same; it must succeed."""
        answer = self.call(*command)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout

    def sbatch(self, *arguments: object, options: tuple[str, ...] = ()) -> str:
        """The id of `sbatch --nodes=2 OPTIONS slurm/train.sh tiny.yaml ARGUMENTS`."""
        place = (
            "--parsable",
            "--nodes=2",
            f"--chdir={ROOT}",
            f"--output={self.folder}/slurm-%j.out",
        )
        run = f"run.output_dir={self.run}"
        return self("sbatch", *place, *options, TRAIN, self.config, run, *arguments).strip()

    def launch(self, *arguments: object) -> str:
        return self(BIN / "t5vae-launch", *arguments)

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "tiny"

    def log(self, job: str) -> str:
        path = self.folder / f"slurm-{job}.out"
        return path.read_text() if path.exists() else ""

    def state(self, job: str) -> str:
        return self("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}").strip()

    def wait(self, seen: Callable[[], object], about: Callable[[], str] = lambda: "") -> None:
        """Until something is seen."""
        end = time.monotonic() + PATIENCE
        while not seen():
            assert time.monotonic() < end, about() + self("squeue")
            time.sleep(0.2)

    def end(self, job: str) -> str:
        """The state in which a job ends."""
        self.wait(lambda: self.state(job) in OVER, lambda: self.log(job))
        return self.state(job)

    def steps(self) -> int:
        """The newest step that a run has logged."""
        lines = read(self.run / "metrics.jsonl")
        return lines[-1]["step"] if lines else 0

    def attempts(self) -> list[dict]:
        return read(self.run / "attempts.jsonl")


def read(path: Path) -> list[dict]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.fixture
def slurm(cluster: ModuleType, corpus: Path, tmp_path: Path) -> Iterator[Slurm]:
    """A user's shell; at the end no job is left, nobody's process on any node, and all are well."""
    user = Slurm(tmp_path, corpus)
    yield user
    user("scancel", "--user=root")
    user.wait(lambda: not user("squeue", "--noheader"))
    user.wait(lambda: cluster.idle() == len(cluster.node_names()), lambda: user("sinfo"))
    user.wait(lambda: not programs(cluster), lambda: f"left on the nodes: {programs(cluster)}")


def programs(cluster: ModuleType) -> list[str]:
    """What runs on the nodes and is none of SLURM's own."""
    every = [Path(f"/proc/{pid}/comm") for n in cluster.node_names() for pid in cluster.pids(n)]
    names = [file.read_text().strip() for file in every if file.exists()]
    return [name for name in names if name not in OF_SLURM]


@pytest.fixture(scope="session")
def pace(cluster: ModuleType, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Steps a second of the small run on two hosts."""
    user = Slurm(tmp_path_factory.mktemp("pace"), corpus)
    job = user.sbatch("train.steps=400")
    assert user.end(job) == "COMPLETED", user.log(job)
    first, *_, last = read(user.run / "metrics.jsonl")
    return (last["step"] - first["step"]) / (last["time"] - first["time"])
