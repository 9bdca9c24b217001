"""What all tests share: one thread a process, no network, a launcher of ranks, the command."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch and transformers are imported. Tiny models gain nothing from threads, which wait for
# each other where other programs run; a forgotten download fails at once; torch's store asks for
# the name of each address, and a name server that does not answer would hold it up for 10 s.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """Gives the signals back that a test takes over; what it starts would inherit them."""
    numbers = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def run_ranks():
    """Start a test's own file once for each rank, with the rank and a folder as its arguments."""

    def run(file: str, world: int, folder: Path, **environment: str) -> None:
        environment = {**os.environ, **environment}
        if sys.platform == "linux":  # elsewhere the loopback has another name
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        ranks = [
            subprocess.Popen(
                [sys.executable, file, str(rank), str(folder)],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        try:
            errors = [rank.communicate(timeout=300)[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert all(rank.returncode == 0 for rank in ranks), "\n".join(errors)[-3000:]

    return run


@pytest.fixture
def t5vae(monkeypatch, capsys):
    """Runs `t5vae ...` through its main(); returns exit code, standard output and error."""

    def run(*arguments, stdin: bytes = b"", errors: str = "strict") -> tuple[int, str, str]:
        from t5vae import cli

        monkeypatch.setattr(sys, "argv", ["t5vae", *map(str, arguments)])
        stream = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", stream)
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return (caught.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def launch(monkeypatch, capsys):
    """The same for `t5vae-launch ...`."""

    def run(*arguments) -> tuple[int, str, str]:
        from launcher.cli import main

        monkeypatch.setattr(sys, "argv", ["t5vae-launch", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        return (caught.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def error_line(t5vae):
    """Runs `t5vae ...` that must be refused; returns the one line that says why."""

    def run(*arguments, **how) -> str:
        code, out, err = t5vae(*arguments, **how)
        assert code == 2, out + err
        assert out == ""
        assert len(err.splitlines()) == 1, err
        assert err.startswith("error: ")
        return err

    return run
