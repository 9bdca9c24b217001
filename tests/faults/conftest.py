"""Runs whose storage fails: one that nothing happened to, and what starts others."""

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import shards
from t5vae.checkpoint.retention import list_checkpoints, step_of
from tests import launching
from tests.launching import (
    PATIENCE,
    Ranks,
    exact_metrics,
    rank_starter,
    run_of,
    small_config,
)

HERE = Path(__file__).parent
WORLD, STEPS, EVERY, HALF = 2, 8, 2, 4
TIMEOUT = 4  # seconds that ranks wait for each other, and twice what they wait for storage


class Call:
    """A call that faults.c recorded: when (seconds since 1970), in which phase, what, and where."""

    def __init__(self, line: str):
        when, self.phase, self.operation, error, self.path = line.split("\t", 4)
        self.when, self.error = float(when), int(error)


@dataclass
class Trial:
    """Two ranks that were started under faults.c."""

    ranks: Ranks
    record: Path

    def calls(self, rank: int) -> list[Call]:
        path = self.record / f"{rank}.calls"
        return [Call(line) for line in path.read_text().splitlines()] if path.exists() else []

    def failed(self) -> float | None:
        """When the first call was made to fail, in seconds since 1970."""
        calls = [call for rank in range(WORLD) for call in self.calls(rank)]
        return min((call.when for call in calls if call.error), default=None)

    def ended(self) -> float:
        """When the last rank ended, in seconds since 1970."""
        return max(files["exit"].stat().st_mtime for files in self.ranks.files)

    def end(self, patience: float = PATIENCE) -> list[int | None]:
        """The exit codes of all ranks; None for one that had to be killed."""
        try:
            return self.ranks.end(patience=patience)
        except AssertionError:
            codes = [f["exit"].exists() and int(f["exit"].read_text()) for f in self.ranks.files]
            self.ranks.kill()
            return [None if code is False else code for code in codes]

    def output(self) -> str:
        return "".join(self.ranks.output(rank) for rank in range(WORLD))

    def errors(self) -> list[str]:
        """The lines that say what went wrong, of all ranks."""
        return [line for rank in range(WORLD) for line in self.ranks.errors(rank)]


@pytest.fixture(scope="module")
def small_dataset(tmp_path_factory) -> Path:
    """Three global batches an epoch, each of which reads its blocks again."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = (f"value_{i} = function_{i % 7}({', '.join('abcdef'[: i % 6])})" for i in range(64))
    (folder / "lines.txt").write_text("\n".join(texts) + "\n")
    options = {"max_length": 24, "valid_fraction": 0.25, "block_size": 16}
    shards.build(folder / "lines.txt", folder / "dataset", tokenizer="train:300", **options)
    return folder / "dataset"


@pytest.fixture(scope="module")
def try_out(tmp_path_factory) -> Iterator[Callable[..., Trial]]:
    """Starts two ranks: try_out(config, *overrides, faults=[...], trace=False). Threads may too."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler (cc) to build the library that makes calls fail")
    folder = tmp_path_factory.mktemp("faults")
    library = folder / "libfaults.so"
    command = [compiler, "-shared", "-fPIC", "-O1", HERE / "faults.c", "-o", library, "-ldl"]
    subprocess.run(command, check=True)
    turn = threading.Lock()

    def start(config: Path, *overrides: str, faults: Any = (), trace: bool = False) -> Trial:
        with turn:
            record = folder / f"calls-{len(list(folder.glob('calls-*')))}"
            record.mkdir()
            asked = {"record": str(record), "trace": trace, "faults": list(faults)}
            return Trial(starter(WORLD, config, *overrides, **asked), record)

    with contextlib.ExitStack() as stack:
        with (
            patch.object(launching, "SLOW_SAVES", HERE / "_ranks.py"),
            patch.dict(os.environ, LD_PRELOAD=str(library)),
        ):
            starter = stack.enter_context(rank_starter(folder))
        yield start


@dataclass
class Golden:
    """A run that nothing happened to.

    Attributes:
        half: the same run, killed at half of its steps; what fails does so as it goes on from here.
        trials: both of them, with all calls that they made.
    """

    config: Path
    run: Path
    half: Path
    trials: list[Trial]


@pytest.fixture(scope="module")
def golden(try_out, small_dataset, tmp_path_factory) -> Golden:
    folder = tmp_path_factory.mktemp("golden")
    config = small_config(
        folder,
        small_dataset,
        optim={"name": "adamw"},
        train={"steps": STEPS, "timeout": TIMEOUT},
        checkpoint={"every": EVERY, "keep_last": STEPS},
        eval={"every": EVERY, "sequences": 8, "decoded": 2},
    )
    whole = try_out(config, trace=True)
    assert whole.ranks.end() == [0, 0], whole.output()
    run, half, again = run_of(config), folder / "half", folder / "again" / "run"
    shutil.copytree(run, half)
    for checkpoint in list_checkpoints(half / "checkpoints"):
        if step_of(checkpoint) > HALF:
            shutil.rmtree(checkpoint)
    shutil.copytree(half, again)
    rest = try_out(config, *going_on(again), trace=True)
    assert rest.ranks.end() == [0, 0], rest.output()
    assert exact_metrics(again) == exact_metrics(run)
    return Golden(config, run, half, [whole, rest])


def going_on(run: Path) -> list[str]:
    """The settings of a run that goes on in a folder, and deletes a checkpoint at its next save."""
    return [f"run.output_dir={run}", f"checkpoint.keep_last={HALF // EVERY}"]
