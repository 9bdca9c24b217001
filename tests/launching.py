"""Starting real training runs: as users do, or as ranks of a process that has all its imports."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from t5vae.checkpoint import retention
from t5vae.config import load_config
from t5vae.metrics.reading import read_metrics

TRAIN = Path(__file__).parents[1] / "train.py"
SLOW_SAVES = Path(__file__).parent / "training/_slow_saves.py"
BIN = Path(sys.executable).parent
SPEEDS = ("tokens_per_second", "sequences_per_second", "step_seconds", "data_wait")
SAVES = ("checkpoint_seconds", "checkpoint_stall")
TIMINGS = (*SPEEDS, *SAVES, "time", "memory_bytes", "checkpoint", "eval/seconds")
PATIENCE = 300  # seconds until a launch is given up, far more than any needs
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}


def environment() -> dict[str, str]:
    """That of a training run that no launcher started, on a CPU."""
    launchers = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "SLURM_", "CROSS_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return env | {"OMP_NUM_THREADS": "1"}


def wait_until(seen: Callable[[], bool], program: Any, patience: float = PATIENCE) -> None:
    """Until something is seen while a program (`Launch` or `Ranks`) runs."""
    deadline = time.monotonic() + patience
    while not seen():
        assert program.is_alive(), f"ended too early:\n{program.output()}"
        assert time.monotonic() < deadline, program.output()
        time.sleep(0.002)


@dataclass
class Launch:
    """A launched program, in a process group of its own."""

    process: subprocess.Popen
    log: Path

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> int:
        return self.process.wait(PATIENCE)

    def wait_until(self, seen: Callable[[], bool]) -> None:
        """Until something is seen while the program runs."""
        wait_until(seen, self)

    def kill(self) -> None:
        """Kill the program and all that it started, which torchrun puts into other groups."""
        children = []
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, PATIENCE)
        self.process.wait(PATIENCE)

    def rank(self, number: int) -> psutil.Process | None:
        """The process that trains as this local rank of the deepspeed launcher."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.environ().get("LOCAL_RANK") == str(number):
                    return child
        return None


@contextlib.contextmanager
def launcher(folder: Path) -> Iterator[Callable[..., Launch]]:
    """What starts a program, its output under `folder`; whatever is left of it ends here."""
    launches: list[Launch] = []

    def start(*command: Any, **more: str) -> Launch:
        log = folder / f"{len(launches)}.log"
        with open(log, "w") as file:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**environment(), **more},
                start_new_session=True,
            )
        launches.append(Launch(process, log))
        return launches[-1]

    try:
        yield start
    finally:
        for started in launches:
            started.kill()


def deepspeed(*arguments: Any) -> list[Any]:
    """The command that starts two ranks as `deepspeed train.py ARGUMENTS` does."""
    options = ["--num_accelerators", 2, "--master_port", free_port(), "--log_level", "error"]
    return [BIN / "deepspeed", *options, TRAIN, *arguments]


def torchrun(script: Path, *arguments: Any, ranks: int = 2) -> list[Any]:
    """The command that starts ranks of a script."""
    options = ["--nproc-per-node", ranks, "--master-port", free_port()]
    return [BIN / "torchrun", *options, script, *arguments]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@dataclass
class Ranks:
    """Processes that train together, each started by itself.

    Attributes:
        files: of each rank: `output`, `pid` and, once it has ended, `exit`.
    """

    files: list[dict[str, Path]]

    def output(self, rank: int = 0) -> str:
        return self.files[rank]["output"].read_text(errors="replace")

    def errors(self, rank: int = 0) -> list[str]:
        """The lines that say what went wrong; a traceback's are none."""
        return [line for line in self.output(rank).splitlines() if line.startswith("error: ")]

    def pid(self, rank: int) -> int:
        return int(self.files[rank]["pid"].read_text())

    def is_alive(self) -> bool:
        """Whether all of them still run."""
        return not any(file["exit"].exists() for file in self.files)

    def wait_until(self, seen: Callable[[], bool]) -> None:
        """Until something is seen while all ranks run."""
        wait_until(seen, self)

    def send(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks or range(len(self.files)):
            if not self.files[rank]["exit"].exists():
                os.kill(self.pid(rank), number)

    def end(self, *ranks: int, patience: float = PATIENCE) -> list[int]:
        """The exit codes of some ranks, or of all."""
        deadline = time.monotonic() + patience
        waited_for = [self.files[rank] for rank in ranks or range(len(self.files))]
        while not all(file["exit"].exists() for file in waited_for):
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.002)
        return [int(file["exit"].read_text()) for file in waited_for]

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.end()


@contextlib.contextmanager
def rank_starter(folder: Path, **more: str) -> Iterator[Callable[..., Ranks]]:
    """What starts ranks by their environment alone, their output under `folder`.

    They are forked by a process that has imported everything, which makes a start ten times as
    fast; all else is theirs: signals, process group, exit.
    """
    started: list[Ranks] = []
    env = environment() | {"TORCHDYNAMO_DISABLE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"} | more
    if sys.platform == "linux":  # elsewhere the loopback has another name
        env["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, str(SLOW_SAVES), "serve"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, env=env)

    def start(world: int, config: Path, *overrides: str, **slow_saves: Any) -> Ranks:
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port()), "SLOW_SAVES": json.dumps(slow_saves)}
        files = []
        for rank in range(world):
            stem = f"{len(started)}-{rank}"
            files.append({name: folder / f"{stem}.{name}" for name in ("output", "pid", "exit")})
            request = {
                "environment": {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                "arguments": [str(config), *overrides],
                **{name: str(path) for name, path in files[-1].items()},
            }
            server.stdin.write(json.dumps(request).encode() + b"\n")
        server.stdin.flush()
        started.append(Ranks(files))
        deadline = time.monotonic() + PATIENCE
        while not all(file["pid"].exists() for file in files):
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return started[-1]

    try:
        yield start
    finally:
        for ranks in started:
            ranks.kill()
        server.stdin.close()
        server.wait(PATIENCE)


def small_config(folder: Path, dataset: Path, **sections: dict) -> Path:
    """Write a small run's configuration into a folder, which its run's own folder goes to too.

    Its precisions are fixed: what is faster here and now must not decide what numbers come out.
    """
    fixed = {"train": {"precision": "fp32"}, "optim": {"muon_precision": "fp32"}}
    sections = {**sections, **{name: fixed[name] | sections.get(name, {}) for name in fixed}}
    whole = {
        "run": {"output_dir": str(folder / "run")},
        "data": {"shards": str(dataset), "global_batch_size": 16},
        "model": {"t5": T5, "latent_size": 8, "token_size": 4},
        "objective": {"latent_noise": 0.5},
        "log": {"every": 1},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**whole, **sections}))
    return path


def run_of(config: Path) -> Path:
    return load_config(config).run_dir


def steps_saved(run: Path) -> list[int]:
    found = retention.list_checkpoints(run / "checkpoints")
    return [retention.step_of(path) for path in found]


def lines_written(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def exact_metrics(run: Path) -> list[str]:
    """Every line without what no two runs share; as text, in which floats are exact."""
    lines = read_metrics(run)
    return [json.dumps({k: v for k, v in line.items() if k not in TIMINGS}) for line in lines]
