"""Builds that are halted, and go on."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import webdataset

import shards
from t5vae.common.errors import UserError

OPTIONS = {
    "tokenizer": "train:300",
    "max_length": 12,
    "overflow": "split",
    "valid_fraction": 0.1,
    "block_size": 32,
    "shard_size": 8192,
}
BUILD = """
import os, signal, sys
import shards, shards.write.spool, shards.write.stages

source, out, options, fatal = sys.argv[1:]

def watch(event, arguments):
    if event in ("open", "os.rename") and fatal and str(arguments[0]).endswith(fatal):
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    shards.write.stages.LEAST_GROUP = 2000
    shards.write.spool.RUN_BYTES = 2000
    shards.write.spool.BUCKET_BYTES = 1500
    sys.addaudithook(watch)
    shards.build(source, out, **eval(options))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "build.py"
    path.write_text(BUILD)
    return path


@pytest.fixture(scope="module")
def never_halted(parts, tmp_path_factory):
    out = tmp_path_factory.mktemp("never") / "d"
    shards.build(parts, out, **OPTIONS)
    return out


@pytest.mark.slow
def test_a_killed_build_goes_on(
    parts, tmp_path, never_halted, digests, script, small_parts, capsys
):
    """Killed in each stage, when it is about to touch a certain file."""
    done = 0
    for fatal in (
        "read/00007-00001.arrow.part",
        "tokenizer.part",
        "cut/00003.json.part",
        "tokens/00005.npz.part",
        "dataset/train-00000.tar",
    ):
        arguments = [script, parts, tmp_path / "d", repr(OPTIONS), fatal]
        killed = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert ("going on" in killed.stderr) == (done > 0)
        assert os.listdir(tmp_path) == [".d.build"]
        finished = len(list((tmp_path / ".d.build").rglob("*.json")))
        assert finished >= done
        done = finished
    assert done > 40
    capsys.readouterr()
    shards.build(parts, tmp_path / "d", **OPTIONS)
    said = capsys.readouterr().err
    assert "going on" in said
    assert "read the corpus" not in said
    assert digests(tmp_path / "d") == digests(never_halted)
    assert os.listdir(tmp_path) == ["d"]


def test_workers_die_with_their_parent(parts, tmp_path, never_halted, digests, script, small_parts):
    arguments = [script, parts, tmp_path / "d", repr(OPTIONS | {"workers": 2}), ""]
    build = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE, text=True)
    family = psutil.Process(build.pid)
    while not (workers := [p for p in family.children() if "spawn_main" in str(p.cmdline())]):
        assert build.poll() is None, build.stderr.read()
        time.sleep(0.01)
    build.kill()
    build.communicate()
    assert not psutil.wait_procs(workers, timeout=30)[1]
    shards.build(parts, tmp_path / "d", **OPTIONS)
    assert digests(tmp_path / "d") == digests(never_halted)


def test_ctrl_c_is_one_line(parts, tmp_path, script):
    arguments = [script, parts, tmp_path / "d", repr(OPTIONS | {"workers": 2}), ""]
    build = subprocess.Popen(
        [sys.executable, *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not list(tmp_path.glob(".d.build/parts/read/*.json")):
        assert build.poll() is None, build.stderr.read()
        time.sleep(0.01)
    os.killpg(build.pid, signal.SIGINT)
    said = build.communicate(timeout=60)[1]
    assert "run the same command again to go on" in said
    assert "SpawnProcess" not in said  # no worker complains
    assert os.listdir(tmp_path) == [".d.build"]


def test_a_full_disk_is_one_line_and_the_build_goes_on(
    parts, tmp_path, never_halted, digests, small_parts, monkeypatch, capsys
):
    save = np.savez

    def fill_up(file, **arrays):
        if ".part" in file.name and "00004" in file.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(file, **arrays)

    def full(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(np, "savez", fill_up)
    with pytest.raises(UserError, match=r"no space left .* same command again") as error:
        shards.build(parts, tmp_path / "d", **OPTIONS)
    assert "\n" not in str(error.value)
    assert str(tmp_path / ".d.build") in str(error.value)
    monkeypatch.setattr(np, "savez", save)
    with monkeypatch.context() as later:
        later.setattr(webdataset.TarWriter, "write", full)
        with pytest.raises(UserError, match="no space left"):
            shards.build(parts, tmp_path / "d", **OPTIONS)
    assert "4 tokenizing" in capsys.readouterr().err
    shards.build(parts, tmp_path / "d", **OPTIONS)
    assert digests(tmp_path / "d") == digests(never_halted)


def test_what_was_made_by_another_recipe_is_not_used(
    parts, tmp_path, never_halted, digests, monkeypatch, capsys
):
    def halt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as later:
        later.setattr(webdataset.TarWriter, "write", halt)
        with pytest.raises(KeyboardInterrupt):
            shards.build(parts, tmp_path / "d", **OPTIONS | {"seed": 1})
    shards.build(parts, tmp_path / "d", **OPTIONS)
    assert "going on" not in capsys.readouterr().err
    assert digests(tmp_path / "d") == digests(never_halted)


def test_bad_input_leaves_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"t": "a"}\n{"t": \n')
    options = OPTIONS | {"format": "jsonl", "column": "t"}
    with pytest.raises(UserError, match="line 2"):
        shards.build(tmp_path / "a.jsonl", tmp_path / "d", **options)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_second_builder_is_refused(parts, tmp_path):
    (tmp_path / ".d.build").mkdir()
    with open(tmp_path / ".d.build" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is building"):
            shards.build(parts, tmp_path / "d", **OPTIONS)
        assert os.listdir(tmp_path / ".d.build") == ["lock"]
    shards.build(parts, tmp_path / "d", **OPTIONS)
