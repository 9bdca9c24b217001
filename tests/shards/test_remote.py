"""Datasets at URLs."""

import errno
import json
import re
import shutil
import time
from itertools import islice
from socket import gaierror
from ssl import SSLCertVerificationError

import aiohttp
import fsspec
import numpy as np
import pytest
from botocore.exceptions import ClientError
from fsspec.exceptions import FSTimeoutError
from fsspec.registry import known_implementations
from s3fs.errors import translate_boto_error
from typer.testing import CliRunner

import shards
from shards import ShardStream
from shards.cli import app
from shards.storage.cache import Cache
from shards.storage.requests import Remote
from t5vae.common.errors import DamageError, StorageError, UserError
from tests.shards.site import everything

pytestmark = pytest.mark.usefixtures("node")


def epoch(path) -> list[list[int]]:
    """The ids of all sequences, in the stream's order."""
    n = shards.open_index(path).sequences("train")
    with ShardStream(path, seed=0, global_batch_size=100) as stream:
        return [ids for batch in islice(stream, n // 100) for ids in batch.ids.tolist()]


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def impatient(node, monkeypatch) -> None:
    monkeypatch.setattr("t5vae.common.storage._patience", 0.2)


@pytest.fixture
def s3(monkeypatch):
    """An S3 server of this machine."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield fsspec.filesystem("s3", skip_instance_cache=True)
    server.stop()


@pytest.mark.parametrize("protocol", ["http", "memory", "s3"])
def test_a_url_streams_as_the_folder_does(dataset, node, request, protocol):
    if protocol == "http":
        url = request.getfixturevalue("site").url
    elif protocol == "memory":
        url = "memory://bucket/small"
        fsspec.filesystem("memory").put(str(dataset), "/bucket/small", recursive=True)
    else:
        url = "s3://bucket/small"
        fs = request.getfixturevalue("s3")
        fs.mkdir("bucket")
        fs.put(str(dataset), "bucket/small", recursive=True)
    assert epoch(url) == epoch(dataset)
    remote, local = shards.open_index(url), shards.open_index(dataset)
    assert remote.sha256 == local.sha256
    assert remote.texts("valid", np.arange(5)) == local.texts("valid", np.arange(5))
    report = shards.verify(url)
    assert report.ok, report.problems
    assert report.path == url
    with pytest.raises(UserError, match="no dataset"):
        shards.open_index(f"{url}/nothing")


def test_a_damaged_block_of_a_url_is_named(site):
    index = shards.open_index(site.url)
    first = index.blocks[index.blocks["shard"] == 1][0]
    path = site.folder / "train-00001.tar"
    content = bytearray(path.read_bytes())
    content[int(first["tokens_offset"])] ^= 1
    path.write_bytes(content)
    block = f"{site.url}/train-00001.tar, block 0 is damaged (its checksum differs)"
    with pytest.raises(DamageError, match=re.escape(block)):
        everything(index)
    assert shards.verify(site.url).problems[1:] == [block]


@pytest.fixture(scope="module")
def rebuilt(dataset, tmp_path_factory):
    """Other lines, built with the options and the tokenizer of `dataset`."""
    folder = tmp_path_factory.mktemp("rebuilt")
    (folder / "lines.txt").write_text("\n".join(f"other_{i} = {i % 9} + f(x)" for i in range(1000)))
    options = {"max_length": 24, "valid_fraction": 0.1, "block_size": 32, "shard_size": 8192}
    tokenizer = dataset / "tokenizer"
    shards.build(folder / "lines.txt", folder / "new", tokenizer=tokenizer, **options)
    return folder / "new"


def is_refused(call, location, index="another") -> None:
    """One line that says so, and no damage, which could be skipped."""
    with pytest.raises(UserError) as caught:
        call()
    assert type(caught.value) is UserError
    assert f"{location} was replaced while it was read" in str(caught.value)
    assert f"its index.json is {index}" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("on_corrupt", ["error", "skip"])
@pytest.mark.parametrize("where", ["url", "folder"])
def test_a_dataset_that_is_replaced_while_it_streams_is_no_damage(
    site, dataset, rebuilt, node, where, on_corrupt
):
    location = site.url if where == "url" else site.folder
    options = {"seed": 0, "global_batch_size": 10}
    opened = shards.open_dataset(location, Cache(node, limit_bytes=1))  # no copies
    with (
        ShardStream(dataset, **options) as expected,
        ShardStream(opened, **options, on_corrupt=on_corrupt) as stream,
    ):
        for _ in range(3):
            assert next(stream).ids.tolist() == next(expected).ids.tolist()
        shutil.copytree(rebuilt, site.folder, dirs_exist_ok=True)

        def go_on():
            while True:
                batch = next(stream)
                assert batch.ids.tolist() == next(expected).ids.tolist()
                assert batch.weights.all()

        is_refused(go_on, location)
        assert stream.quarantined == 0


@pytest.mark.parametrize("where", ["url", "folder"])
def test_a_dataset_that_is_replaced_once_it_is_open_is_refused(site, rebuilt, where):
    location = site.url if where == "url" else str(site.folder)
    opened = [shards.open_index(location) for _ in range(3)]
    assert len(opened[0].blocks)
    shutil.copytree(rebuilt, site.folder, dirs_exist_ok=True)
    is_refused(lambda: everything(opened[0]), location)
    is_refused(lambda: everything(opened[1]), location)  # its blocks.npy was never read
    is_refused(lambda: opened[2].tokenizer(), location)
    assert len(everything(shards.open_index(location))) > 800


def test_a_dataset_that_was_removed_once_it_was_open_is_refused(site):
    index = shards.open_index(site.folder)
    assert len(index.blocks)
    shutil.rmtree(site.folder)
    is_refused(lambda: everything(index), site.folder, "gone")


def test_what_was_copied_whole_is_read_on_whatever_lies_at_the_url(site, dataset, rebuilt, node):
    index = shards.open_index(site.url)
    whole = everything(index)
    for name in (shard.name for shard in index.shards):
        shutil.copy(dataset / name, node / index.sha256 / name)
    shutil.copytree(rebuilt, site.folder, dirs_exist_ok=True)
    assert everything(index) == whole


def test_a_dataset_replaced_while_it_is_verified_is_no_damage(site, rebuilt, monkeypatch):
    from shards.read import verifier

    def replace(index):
        shutil.copytree(rebuilt, site.folder, dirs_exist_ok=True)
        return []

    monkeypatch.setattr(verifier, "_tokenizer", replace)
    (problem,) = shards.verify(site.folder).problems
    assert "was replaced while it was read" in problem


@pytest.mark.parametrize(
    ("location", "told"),
    [
        ("https://host/data/train-{00000..00010}.tar", "give https://host/data, or"),
        ("https://host/data/train-{00..10}.tar.gz", "give https://host/data, or"),
        ("s3://bucket/a/{train,valid}-00000.tar", "give s3://bucket/a, or"),
        ("data/python/train-*.tar", "give data/python, or"),
        ("https://host/a-{0..1}.tar::https://host/b.tar", "give https://host, or"),
        ("train-00000.tar", "give that, or"),
        ("https://host/{code,prose}", "several as a list"),
    ],
)
def test_tar_files_and_braces_in_place_of_a_folder_are_one_line(location, told):
    for call in (
        lambda: shards.open_index(location),
        lambda: shards.open_dataset([location, "elsewhere"]),
        lambda: ShardStream(location, seed=0, global_batch_size=1),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert str(caught.value).startswith(location)
        assert told in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_a_folder_with_braces_in_its_name_is_opened(dataset, tmp_path):
    for name in ("{a,b}", "train-{0..1}.tar"):
        (tmp_path / name).symlink_to(dataset)
        assert shards.open_index(tmp_path / name).sequences("train") > 800


def skipping(site) -> ShardStream:
    n = shards.open_index(site.url).sequences("train")
    return ShardStream(site.url, seed=0, global_batch_size=n, on_corrupt="skip")


@pytest.mark.parametrize("fault", [500, 502, 503, 504, 408, 425, 429, "cut"])
def test_requests_that_fail_for_a_while_are_made_again(site, dataset, node, fault):
    for name in ("train-00000.tar", "blocks.npy", "index.json", "tokenizer/tokenizer.json"):
        site.faults |= {(name, "part"): [fault] * 4, (name, "whole"): [fault] * 4}
    index, local = shards.open_index(site.url), shards.open_index(dataset)
    numbers = np.arange(local.sequences("train"))
    assert index.texts("train", numbers) == local.texts("train", numbers)
    assert not site.faults["train-00000.tar", "part"]
    assert not site.faults["tokenizer/tokenizer.json", "whole"]
    until(lambda: [*node.rglob("train-00000.tar")])  # copies are patient too
    for name in ("train-00000.tar", "blocks.npy", "index.json"):
        site.faults |= {(name, "part"): [fault] * 4, (name, "whole"): [fault] * 4}
    assert shards.verify(site.url).problems == []


@pytest.mark.parametrize("fault", [500, 503, 429, "cut"])
def test_a_server_that_fails_for_ever_is_no_damage(site, impatient, t5vae, fault):
    name = "train-00000.tar"
    site.faults = {(name, "part"): [fault] * 9999}
    with skipping(site) as stream, pytest.raises(StorageError) as caught:
        next(stream)
    assert re.match(rf"{site.url}/{name}, block \d+: the storage fails \(", str(caught.value))
    assert len(str(caught.value).splitlines()) == 1
    assert stream.quarantined == 0
    code, out, err = t5vae("shards", "verify", site.url)
    assert (code, out) == (1, "")
    assert f"error: {site.url}/{name}: the storage fails (" in err


def test_a_server_that_is_not_there_is_no_missing_dataset(site, impatient):
    site.gone.set()
    with pytest.raises(StorageError, match=rf"{site.url}/index\.json: the storage fails"):
        shards.open_index(site.url)
    with pytest.raises(StorageError, match=r"index\.json: the storage fails \(Connect call failed"):
        shards.open_index("http://127.0.0.1:9/data")


@pytest.mark.parametrize("fault", [401, 403, 400, 409])
def test_access_denied_is_the_users_to_mend(site, t5vae, fault):
    name = "train-00000.tar"
    site.faults = {(name, "part"): [fault] * 9999}
    with skipping(site) as stream, pytest.raises(UserError) as caught:
        next(stream)
    assert not isinstance(caught.value, DamageError)
    line = str(caught.value)
    assert re.match(rf"cannot read {site.url}/{name}, block \d+: {fault}, ", line)
    assert ("credentials" in line) is (fault in (401, 403))
    assert len(line.splitlines()) == 1
    code, out, err = t5vae("shards", "verify", site.url)
    assert (code, out) == (2, "")
    assert f"error: cannot read {site.url}/{name}: {fault}, " in err


def test_a_range_beyond_a_files_end_is_damage(site):
    site.faults = {("train-00000.tar", "part"): [416] * 9999}
    with pytest.raises(DamageError, match=r"train-00000\.tar, block \d+ is cut off"):
        everything(shards.open_index(site.url))


class NoCredentialsError(Exception):
    """As botocore's."""


def of_boto(status: int, code: str) -> Exception:
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(answer, "GetObject"))


def with_status(name: str, status: int | str) -> Exception:
    error = Exception("refused\nmore of it")
    setattr(error, name, status)
    return error


WHERE = aiohttp.client_reqrep.ConnectionKey("host", 80, False, True, None, None, None)
UNRESOLVED = aiohttp.ClientConnectorDNSError(WHERE, gaierror(-3, "Temporary failure"))
FAILURES = [
    (UNRESOLVED, errno.EIO),
    (aiohttp.ServerDisconnectedError(), errno.EIO),
    (aiohttp.ClientPayloadError("cut"), errno.EIO),
    (TimeoutError(), errno.EIO),
    (FSTimeoutError(), errno.EIO),
    (ConnectionResetError(104, "reset"), errno.EIO),
    (BrokenPipeError(32, "broken"), errno.EIO),
    (of_boto(503, "SlowDown"), errno.EIO),
    (of_boto(500, "InternalError"), errno.EIO),
    (of_boto(400, "RequestTimeout"), errno.EIO),
    (of_boto(403, "AccessDenied"), errno.EACCES),
    (of_boto(400, "ExpiredToken"), errno.EACCES),
    (of_boto(404, "NoSuchKey"), errno.ENOENT),
    (of_boto(400, "InvalidBucketName"), errno.EINVAL),
    (with_status("code", "429"), errno.EIO),  # gcsfs's
    (with_status("code", 401), errno.EACCES),
    (OSError("Forbidden: bucket/file\nno right"), errno.EACCES),
    (with_status("status_code", 503), errno.EIO),  # adlfs's
    (with_status("status_code", 404), errno.ENOENT),
    (NoCredentialsError("Unable to locate credentials"), errno.EACCES),
    (NotImplementedError(), errno.EINVAL),
    (SSLCertVerificationError(1, "certificate verify failed"), errno.EINVAL),
]


@pytest.mark.parametrize(("failure", "number"), FAILURES, ids=lambda each: repr(each)[:40])
def test_what_each_protocol_raises_is_told_apart(monkeypatch, failure, number):
    remote = Remote("memory://bucket")

    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(remote._fs, "cat_file", fail)
    for request in (lambda: remote.get("file"), lambda: remote.read("file", 0, 9)):
        with pytest.raises(OSError) as caught:  # noqa: PT011 any
            request()
        assert caught.value.errno == number
        assert len(str(caught.value).splitlines()) == 1


def test_a_size_or_a_list_that_cannot_be_told_now_is_weather(monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.pipe("/told/tokenizer/tokenizer.json", b"{}")
    remote = Remote("memory://told")

    def fail_with(error):
        def fail(*_, **__):
            raise error

        return fail

    monkeypatch.setattr(remote._fs, "size", fail_with(FileNotFoundError()))
    with pytest.raises(OSError, match="cannot be told now") as caught:
        remote.size("tokenizer/tokenizer.json")
    assert caught.value.errno == errno.EIO
    for error in (NotImplementedError(), PermissionError(), FileNotFoundError()):
        monkeypatch.setattr(remote._fs, "ls", fail_with(error))
        assert remote.folder("tokenizer") == {"tokenizer.json": b"{}"}
    monkeypatch.setattr(remote._fs, "ls", fail_with(TimeoutError()))
    with pytest.raises(OSError) as caught:  # noqa: PT011 any
        remote.folder("tokenizer")
    assert caught.value.errno == errno.EIO
    monkeypatch.setattr(remote._fs, "ls", fail_with(PermissionError()))
    monkeypatch.setattr(remote._fs, "cat_file", fail_with(PermissionError("denied")))
    with pytest.raises(PermissionError, match="denied"):
        remote.folder("tokenizer")


@pytest.mark.parametrize("most", [1, 7, 100])
def test_a_range_that_comes_piece_by_piece_is_whole(monkeypatch, most):
    fsspec.filesystem("memory").pipe("/pieces/file", bytes(range(50)))
    remote = Remote("memory://pieces")
    cat = remote._fs.cat_file
    monkeypatch.setattr(
        remote._fs, "cat_file", lambda path, start, end: cat(path, start, min(end, start + most))
    )
    assert remote.read("file", 5, 20) == bytes(range(5, 25))
    assert remote.read("file", 40, 20) == bytes(range(40, 50))


def test_a_missing_shard_is_named(site):
    (site.folder / "train-00001.tar").unlink()
    file = f"{site.url}/train-00001.tar"
    message = rf"{file}, block \d+: {file} does not exist"
    with pytest.raises(DamageError, match=message):
        everything(shards.open_index(site.url))
    n = shards.open_index(site.url).sequences("train")
    with ShardStream(site.url, seed=0, global_batch_size=n, on_corrupt="skip") as stream:
        assert 0 < (next(stream).weights == 0).sum() < n
    assert shards.verify(site.url).problems == [f"{file} is missing"]


def test_a_server_without_ranges_is_named(site):
    site.ranges = False
    with pytest.raises(UserError, match=f"{site.url} sends only whole files") as caught:
        everything(shards.open_index(site.url))
    assert not isinstance(caught.value, DamageError)
    site.ranges = True
    with skipping(site) as stream:
        site.ranges = False
        with pytest.raises(UserError, match=r"train-\d+\.tar, block .* sends only whole files"):
            next(stream)


@pytest.mark.parametrize("listed", [True, False])
def test_a_tokenizer_comes_from_a_server_that_lists_its_folder_or_does_not(site, dataset, listed):
    site.listed = listed
    (site.folder / "tokenizer" / "sub").mkdir()
    (site.folder / "tokenizer" / "?C=M;O=A").write_text("to sort the list by date")
    tokenizer = shards.open_index(site.url).tokenizer()
    assert tokenizer.get_vocab() == shards.open_index(dataset).tokenizer().get_vocab()


def test_inspect_and_verify_take_urls(site):
    run = CliRunner().invoke
    shown = run(app, ["inspect", site.url, "--json"])
    assert json.loads(shown.stdout)["examples"]["train"]
    assert run(app, ["verify", site.url]).exit_code == 0
    (site.folder / "train-00000.tar").unlink()
    result = run(app, ["verify", site.url])
    assert result.exit_code == 1
    assert result.stdout == f"{site.url}/train-00000.tar is missing\n"


def test_protocols_that_cannot_be_read_are_one_line(monkeypatch):
    missing = {"class": "missing.FileSystem", "err": "install it"}
    monkeypatch.setitem(known_implementations, "missing", missing)
    for url, message in [
        ("missing://bucket", r"pip install 't5vae\[remote\]' \(install it\)"),
        ("nothing://bucket", "cannot open nothing://bucket: Protocol not known"),
    ]:
        with pytest.raises(UserError, match=message):
            shards.open_index(url)


def test_an_index_cannot_name_files_elsewhere(site):
    index = json.loads((site.folder / "index.json").read_text())
    index["shards"][0]["name"] = "../elsewhere.tar"
    (site.folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DamageError, match=r"index\.json"):
        shards.open_index(site.url)
