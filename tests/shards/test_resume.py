"""Builds that are halted, and go on."""

import errno
import fcntl
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest
import webdataset
import zstandard

import shards
from t5vae.common.errors import StorageError, UserError
from tests.weather import Weather, without_locks

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
        "read/00007-00001.rows.part",
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


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_will_do(
    parts, tmp_path, never_halted, digests, monkeypatch, number
):
    without_locks(monkeypatch, number)
    shards.build(parts, tmp_path / "d", **OPTIONS)
    assert digests(tmp_path / "d") == digests(never_halted)
    assert os.listdir(tmp_path) == ["d"]


@pytest.fixture
def small_groups(monkeypatch):
    """Each file of some kilobytes is read by a task of its own."""
    monkeypatch.setattr("shards.write.stages.LEAST_GROUP", 2000)


@pytest.fixture
def weather(monkeypatch):
    monkeypatch.setattr("shards.write.streams.CHUNK", 1000)
    return Weather(monkeypatch)


LINES = [
    f"{number} {number * 2654435761 % 2**32:x} {'ab' * (number % 5)}" for number in range(2000)
]
BYTES = {"tokenizer": "byte", "max_length": 40, "block_size": 32, "shard_size": 8192}


def write_corpus(path) -> dict[str, str]:
    """Some lines, written as the name of a file says; the options of a build with which it is."""
    text = "".join(f"{line}\n" for line in LINES)
    if path.name.endswith(".parquet"):
        pyarrow.parquet.write_table(pa.table({"n": range(2000), "t": LINES}), path)
    elif ".jsonl" in path.name:
        path.write_text("".join(json.dumps({"t": line}) + "\n" for line in LINES))
    elif ".csv" in path.name:
        path.write_text("n,t\n" + "".join(f"1,{line}\n" for line in LINES))
    else:
        pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
        path.write_bytes(pack(text.encode()))
    has_columns = path.suffix in (".parquet", ".jsonl", ".csv")
    return BYTES | ({"column": "t"} if has_columns else {})


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.zst", "a.parquet", "a.jsonl", "a.csv"])
def test_a_corpus_that_fails_for_a_while_gives_the_same_bytes(tmp_path, digests, weather, name):
    options = write_corpus(tmp_path / name)
    shards.build(tmp_path / name, tmp_path / "whole", **options)
    weather.clear()
    weather.strike(name, errno.EIO, errno.ESTALE, errno.EIO, begin=9_000)
    shards.build(tmp_path / name, tmp_path / "d", **options)
    assert len(weather.opened) >= 4
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.parquet", "a.csv"])
def test_a_corpus_that_fails_for_ever_is_one_line(tmp_path, weather, name):
    options = write_corpus(tmp_path / name)
    weather.strike(name, -errno.EIO, begin=9_000)
    with pytest.raises(StorageError, match=rf"{name}: the storage fails .*same command") as caught:
        shards.build(tmp_path / name, tmp_path / "d", **options)
    assert len(str(caught.value).splitlines()) == 1
    assert (tmp_path / ".d.build").is_dir()


@pytest.mark.parametrize(("number", "code"), [(errno.EIO, 1), (errno.ESTALE, 1), (errno.EACCES, 2)])
def test_a_command_ends_with_a_line_and_a_code(tmp_path, weather, t5vae, number, code):
    write_corpus(tmp_path / "a.txt")
    weather.strike("a.txt", -number)
    command = ["shards", "build", tmp_path / "a.txt", "--out", tmp_path / "d"]
    ended, out, err = t5vae(*command, "--tokenizer", "byte", "--max-length", 40, "--workers", 1)
    assert (ended, out) == (code, "")
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        err.splitlines()[-1]
    ]
    assert os.strerror(number) in err.splitlines()[-1]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_what_was_read_before_the_storage_failed_is_not_read_again(
    parts, tmp_path, digests, weather, small_groups, number
):
    shards.build(parts, tmp_path / "whole", **BYTES)
    weather.clear()
    weather.strike("11.txt", -number)
    with pytest.raises(UserError if number == errno.EACCES else StorageError) as caught:
        shards.build(parts, tmp_path / "d", **BYTES)
    assert "the same command" in str(caught.value)
    weather.clear()
    shards.build(parts, tmp_path / "d", **BYTES)
    assert weather.opened == [f"{number:02}.txt" for number in range(11, 20)]
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["d", "whole"]


def test_work_that_cannot_be_written_for_a_while_is_done_again(
    parts, tmp_path, digests, small_groups, monkeypatch
):
    Weather(monkeypatch)
    shards.build(parts, tmp_path / "whole", **BYTES)
    left = {"savez": 1, "write": 1, "fsync": 2}

    def fails(name, call):
        def once(*args, **more):
            if left[name]:
                left[name] -= 1
                raise OSError(errno.EIO, "Input/output error")
            return call(*args, **more)

        return once

    monkeypatch.setattr(np, "savez", fails("savez", np.savez))
    monkeypatch.setattr(os, "fsync", fails("fsync", os.fsync))
    tar = webdataset.TarWriter
    monkeypatch.setattr(tar, "write", fails("write", tar.write))
    shards.build(parts, tmp_path / "d", **BYTES)
    assert not any(left.values())
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")


def test_work_that_cannot_be_written_is_kept(parts, tmp_path, digests, small_groups, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    weather = Weather(monkeypatch)
    with monkeypatch.context() as later:
        later.setattr(np, "savez", fail)
        with pytest.raises(StorageError, match=r"tokens/00000: the storage fails"):
            shards.build(parts, tmp_path / "d", **BYTES)
    weather.clear()
    shards.build(parts, tmp_path / "d", **BYTES)
    assert weather.opened == []
    shards.build(parts, tmp_path / "whole", **BYTES)
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")


@pytest.fixture
def tables(tmp_path):
    """A folder of ten files, of which the seventh has a bad row."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(10):
        lines = [json.dumps({"t": line}) for line in LINES[number * 100 :][:100]]
        if number == 6:
            lines[50] = "{"
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def mend(folder, options):
    file = folder / "6.jsonl"
    file.write_text(file.read_text().replace("{\n", json.dumps({"t": "mended"}) + "\n"))


def skip(folder, options):
    options["bad_rows"] = "skip"


def shorten(folder, options):
    mend(folder, options)
    options["max_length"] = 9


@pytest.mark.parametrize("change", [mend, skip, shorten])
def test_after_a_bad_row_what_was_read_of_other_files_is_kept(
    tables, tmp_path, digests, weather, small_groups, capsys, change
):
    options = BYTES | {"column": "t"}
    with pytest.raises(UserError, match=r"6.jsonl, line 51: .* what is done is kept"):
        shards.build(tables, tmp_path / "d", **options)
    change(tables, options)
    weather.clear()
    capsys.readouterr()
    shards.build(tables, tmp_path / "d", **options)
    assert weather.opened == [f"{number}.jsonl" for number in range(6, 10)]
    assert "going on with what a halted build has read (tasks done: 6 reading)" in (
        capsys.readouterr().err
    )
    shards.build(tables, tmp_path / "whole", **options)
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")


def seed(folder, options):
    mend(folder, options)
    options["seed"] = 5


def keep_equal(folder, options):
    mend(folder, options)
    options["dedupe"] = False


def rewrite(folder, options):
    mend(folder, options)
    for file in folder.iterdir():
        shutil.copyfile(file, copy := file.with_suffix(".copy"))
        copy.replace(file)


@pytest.mark.parametrize("change", [seed, keep_equal, rewrite])
def test_what_would_be_read_otherwise_is_read_again(
    tables, tmp_path, digests, weather, small_groups, capsys, change
):
    options = BYTES | {"column": "t"}
    with pytest.raises(UserError, match="line 51"):
        shards.build(tables, tmp_path / "d", **options)
    change(tables, options)
    weather.clear()
    shards.build(tables, tmp_path / "d", **options)
    assert weather.opened == [f"{number}.jsonl" for number in range(10)]
    assert "going on" not in capsys.readouterr().err
    shards.build(tables, tmp_path / "whole", **options)
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")


def test_rows_that_were_skipped_are_read_again_where_they_are_to_be_errors(
    tables, tmp_path, small_groups, monkeypatch
):
    options = BYTES | {"column": "t"}

    def halt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as later:
        later.setattr("shards.write.pipeline.open_spool", halt)
        with pytest.raises(KeyboardInterrupt):
            shards.build(tables, tmp_path / "d", bad_rows="skip", **options)
    with pytest.raises(UserError, match=r"6.jsonl, line 51"):
        shards.build(tables, tmp_path / "d", **options)


def test_what_later_stages_have_removed_is_read_again(
    parts, tmp_path, digests, weather, small_groups, monkeypatch
):
    def halt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as later:
        later.setattr(webdataset.TarWriter, "write", halt)
        with pytest.raises(KeyboardInterrupt):
            shards.build(parts, tmp_path / "d", **BYTES)
    weather.clear()
    options = BYTES | {"max_length": 30}
    shards.build(parts, tmp_path / "d", **options)
    assert len(weather.opened) == 20
    shards.build(parts, tmp_path / "whole", **options)
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")


def test_a_corpus_without_texts_leaves_nothing(tmp_path, small_groups):
    (tmp_path / "a.txt").write_text("\n \n" + "too long " * 9 + "\n")
    with pytest.raises(UserError, match="no text to train on") as caught:
        shards.build(tmp_path / "a.txt", tmp_path / "d", **BYTES)
    assert "kept" not in str(caught.value)
    assert os.listdir(tmp_path) == ["a.txt"]
