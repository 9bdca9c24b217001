"""What a stranger may hand over: a run, its export, shards and codes; and a watch on commands."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # noqa: F401 (it starts programs, once)
import pytest

from tests.small_runs import dataset, make_config, python_lines, together  # noqa: F401
from tests.strangers.watch import watched

WRITTEN = Path(__file__).parents[1] / "fixtures/v0.1"


@dataclass
class Handed:
    """What was handed over, as a copy that one thing is to be wrong with.

    Attributes:
        folder: holds `run`, `shards` and `codes`; the working folder.
        secret: a file outside of it.
    """

    folder: Path
    secret: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def codes(self) -> Path:
        return self.folder / "codes"


@pytest.fixture
def handed(tmp_path, monkeypatch) -> Handed:
    """A run with its shards and codes, in the working folder."""
    folder = shutil.copytree(WRITTEN, tmp_path / "handed")
    secret = tmp_path / "secret"
    secret.write_text("the secret\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("T5VAE_CACHE", str(folder / "cache"))
    (folder / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "temporary"))
    return Handed(folder, secret)


@dataclass
class Done:
    """What a command did."""

    code: int
    out: str
    err: str
    deeds: list[str]


@pytest.fixture
def command(handed, t5vae, monkeypatch) -> Callable[..., Done]:
    """Runs `t5vae ...` where it may write into the folder that was handed over alone."""

    def run(*arguments: Any, **how: Any) -> Done:
        with watched(handed.folder, handed.secret) as watch:
            code, out, err = t5vae(*arguments, **how)
        return Done(code, out, err, watch.deeds)

    return run


@pytest.fixture
def launched(handed, launch) -> Callable[..., Done]:
    """The same for `t5vae-launch ...`."""

    def run(*arguments: Any) -> Done:
        with watched(handed.folder, handed.secret) as watch:
            code, out, err = launch(*arguments)
        return Done(code, out, err, watch.deeds)

    return run


def refusal(done: Done) -> str:
    """The one line in which a command was refused that did nothing."""
    assert done.deeds == []
    assert done.code == 2, done.out + done.err
    assert len(done.err.splitlines()) == 1, done.err
    assert done.err.startswith("error: ")
    return done.err


@pytest.fixture
def refused(command) -> Callable[..., str]:
    """Runs `t5vae ...` that must be refused and do nothing; returns the one line that says why."""
    return lambda *arguments, **how: refusal(command(*arguments, **how))


@pytest.fixture
def honest(command) -> Callable[..., str]:
    """Runs `t5vae ...` that must succeed and do nothing else; returns its output."""

    def run(*arguments: Any, **how: Any) -> str:
        done = command(*arguments, **how)
        assert done.code == 0, done.out + done.err
        assert done.deeds == []
        return done.out

    return run
