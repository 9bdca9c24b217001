"""Files whose storage fails for a while: the same bytes, each time opened afresh."""

import errno
import os

import pytest

from t5vae.common.errors import StorageError, UserError
from t5vae.common.files import read_records, reading, write_records
from t5vae.common.patient import open_patiently
from tests.weather import Weather

CONTENT = os.urandom(50_000)


@pytest.fixture
def weather(monkeypatch):
    return Weather(monkeypatch)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


@pytest.mark.parametrize("begin", [0, 1, 20_000, 49_999])
@pytest.mark.parametrize(
    "faults", [[errno.EIO], [errno.ESTALE, errno.ESTALE], [errno.ETIMEDOUT, errno.ENOTCONN]]
)
def test_what_fails_for_a_while_is_read_on(file, weather, begin, faults):
    weather.strike("file", *faults, begin=begin)
    with open_patiently(file) as stream:
        parts = iter(lambda: stream.read(7_000), b"")
        assert b"".join(parts) == CONTENT
    assert len(weather.opened) == 1 + len(faults)


def test_places_are_found_again(file, weather):
    weather.strike("file", errno.EIO, errno.ESTALE, begin=30_000)
    with open_patiently(file) as stream:
        for at in (40_000, 100, 31_000, 0):
            assert stream.seek(at) == stream.tell() == at
            assert stream.read(5_000) == CONTENT[at:][:5_000]
        assert stream.seek(-10, os.SEEK_END) == len(CONTENT) - 10
        assert stream.read() == CONTENT[-10:]
    assert len(weather.opened) == 3


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EREMOTEIO])
def test_what_fails_for_ever_is_told_in_one_line(file, weather, number):
    weather.strike("file", -number, begin=10_000)
    with open_patiently(file) as stream, pytest.raises(StorageError) as caught:
        stream.read()
    line = str(caught.value)
    assert line.startswith(f"{file}: the storage fails ({os.strerror(number)})")
    assert len(line.splitlines()) == 1
    assert len(weather.opened) > 2


@pytest.mark.parametrize("number", [errno.EACCES, errno.EISDIR, errno.EPERM])
def test_other_errors_come_at_once(file, weather, number):
    weather.strike("file", -number)
    with open_patiently(file) as stream, pytest.raises(OSError, match=os.strerror(number)):
        stream.read()
    assert len(weather.opened) == 1


def test_a_file_that_is_another_when_it_is_opened_again_is_refused(file, weather):
    weather.strike("file", errno.EIO, begin=10_000)
    with open_patiently(file) as stream:
        stream.read(9_000)
        file.write_bytes(CONTENT[:-1])
        with pytest.raises(UserError, match="file was changed while it was read"):
            stream.read()


def test_lines_are_read_on_while_more_are_added(tmp_path, weather):
    path = tmp_path / "lines.jsonl"
    records = [{"step": step, "text": "é" * 100} for step in range(500)]
    write_records(path, records)
    weather.strike("lines.jsonl", errno.EIO, errno.ESTALE, begin=20_000)
    assert read_records(path) == records
    weather.strike("lines.jsonl", errno.EIO)
    assert read_records(path, tail=1000) == records[-1:]
    weather.strike("lines.jsonl", errno.EIO, begin=20_000)
    with open_patiently(path, grows=True) as stream:
        stream.readline()
        with path.open("a") as more:
            more.write('{"step": 500}\n')
        assert stream.read().endswith(b'}\n{"step": 500}\n')


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EHOSTDOWN])
def test_storage_that_fails_is_nobodys_mistake(number):
    said = r"^x\.txt: the storage fails \(.*\); the same command goes on"
    with pytest.raises(StorageError, match=said), reading("x.txt"):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT, errno.ENOTDIR])
def test_what_a_user_can_mend_is_told_as_that(number):
    with pytest.raises(UserError, match=r"^cannot read x\.txt: "), reading("x.txt"):
        raise OSError(number, os.strerror(number))
