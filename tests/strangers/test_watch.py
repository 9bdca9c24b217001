"""The watch itself: honest things pass it, and each deed is seen."""

import os
import pickle
import socket
import subprocess
from contextlib import suppress

import numpy as np
import pytest

from tests.strangers.watch import watched


@pytest.mark.parametrize(
    "arguments",
    [
        ("shards", "inspect", "shards"),
        ("shards", "verify", "shards"),
        ("config", "show", "run/config.yaml"),
        ("checkpoints", "run"),
        ("export", "run"),
        ("eval", "run"),
        ("compare", "run"),
        ("plot", "run"),
        ("runs", "."),
        ("reconstruct", "run", "x = 1"),
        ("interpolate", "run", "x = 1", "y = 2"),
        ("sample", "run", "-n", 2, "--prior", "gaussian"),
        ("nearest", "run", "x = 1", "--corpus", "codes"),
        ("decode", "run", "codes"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_honest_files_pass_the_watch(honest, arguments):
    honest(*arguments)


def call(*_):
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.connect_ex(("192.0.2.1", 9))  # which is nobody's


def unpickle(*_):
    pickle.loads(pickle.dumps(suppress))


DEEDS = {
    "wrote": lambda _, outside: (outside / "new").write_text(""),
    "appended": lambda _, outside: open(outside / "file", "a").close(),
    "wrote by a link": lambda inside, _: (inside / "link" / "file").write_text(""),
    "made": lambda _, outside: (outside / "folder").mkdir(),
    "removed": lambda _, outside: (outside / "file").unlink(),
    "moved": lambda inside, outside: (inside / "own").rename(outside / "new"),
    "linked": lambda _, outside: (outside / "new").symlink_to("file"),
    "read the secret": lambda _, outside: (outside / "secret").read_text(),
    "started": lambda *_: subprocess.run(["true"]),
    "system": lambda *_: os.system("true"),
    "called": call,
    "unpickled": unpickle,
}


@pytest.mark.parametrize("deed", DEEDS)
def test_each_deed_is_seen(tmp_path, deed):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "file").touch()
    (outside / "secret").touch()
    (inside / "own").touch()
    (inside / "link").symlink_to(outside)
    with watched(inside, outside / "secret") as watch:
        (inside / "new").write_text("")
        (inside / "own").read_text()
        with socket.socket() as sock:
            sock.connect_ex(("127.0.0.1", 9))
        assert watch.deeds == []
        DEEDS[deed](inside, outside)
    assert len(watch.deeds) == 1


def test_more_memory_than_honest_files_need_is_not_given(tmp_path):
    with watched(tmp_path, tmp_path), pytest.raises(MemoryError):
        np.ones(2**40)
