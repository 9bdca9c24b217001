"""Datasets at URLs."""

import json
import re
import shutil
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
