"""Datasets at URLs."""

import json
import re
from itertools import islice

import fsspec
import numpy as np
import pytest
from fsspec.registry import known_implementations
from typer.testing import CliRunner

import shards
from shards import ShardStream
from shards.cli import app
from shards.storage.cache import Cache
from t5vae.common.errors import DamageError, UserError
from tests.shards.site import everything

pytestmark = pytest.mark.usefixtures("node")


def epoch(path) -> list[list[int]]:
    """The ids of all sequences, in the stream's order."""
    n = shards.open_index(path).sequences("train")
    with ShardStream(path, seed=0, global_batch_size=100) as stream:
        return [ids for batch in islice(stream, n // 100) for ids in batch.ids.tolist()]


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


@pytest.mark.parametrize("fault", [500, 503, "cut"])
def test_requests_that_fail_are_tried_three_times(site, dataset, node, fault):
    name = ("train-00000.tar", "part")
    site.faults = {name: [fault, fault]}
    assert everything(shards.open_index(site.url)) == everything(shards.open_index(dataset))
    site.faults = {name: [fault] * 9}
    message = rf"{site.url}/{name[0]}, block \d+: "
    with pytest.raises(DamageError, match=message):
        everything(shards.open_index(site.url, Cache(node / "another")))


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
    with pytest.raises(UserError, match=f"{site.url} sends only whole files"):
        everything(shards.open_index(site.url))


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
