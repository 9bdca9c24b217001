"""A tokenizer's folder from a stranger: no code of it runs, no file outside of it is opened."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shards
from tests.strangers.conftest import Handed, refusal


def config(name: str = "tokenizer_config.json", **settings: Any) -> Callable[[Handed], None]:
    """Sets keys of a JSON file in the tokenizer's folder."""

    def change(handed: Handed) -> None:
        file = handed.shards / "tokenizer" / name
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | settings).replace("SECRET", str(handed.secret)))

    return change


def module(handed: Handed, also: Callable[[Handed], None]) -> None:
    """Code that leaves a mark."""
    code = "open('ran', 'w')\nclass Evil: pass\n"
    (handed.shards / "tokenizer" / "evil.py").write_text(code)
    also(handed)


def link(name: str, target: str = "") -> Callable[[Handed], None]:
    def change(handed: Handed) -> None:
        path = handed.shards / "tokenizer" / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(target or handed.secret)

    return change


def large(name: str) -> Callable[[Handed], None]:
    def change(handed: Handed) -> None:
        path = handed.shards / "tokenizer" / name
        path.touch()
        os.truncate(path, 100 * 2**30)

    return change


def folder_out(handed: Handed) -> None:
    (handed.shards / "tokenizer").rename(handed.folder / "elsewhere")
    (handed.shards / "tokenizer").symlink_to(handed.folder / "elsewhere")


def fifo(handed: Handed) -> None:
    (handed.shards / "tokenizer" / "tokenizer.json").unlink()
    os.mkfifo(handed.shards / "tokenizer" / "tokenizer.json")


def growing(part: str, kind: str) -> Callable[[Handed], None]:
    """A billion laughs: each step makes a thousand characters of one."""
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    return config("tokenizer.json", **{part: {"type": "Sequence", kind: [step] * 6}})


AUTO = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}
EVIL = {
    "remote code": lambda handed: module(handed, config(auto_map=AUTO, tokenizer_class="Evil")),
    "remote code of the model": lambda handed: module(
        handed, config("config.json", auto_map=AUTO, model_type="evil")
    ),
    "an auto class": lambda handed: module(
        handed,
        lambda handed: (
            config(tokenizer_class="AutoModel")(handed),
            config("config.json", auto_map={"AutoConfig": "evil.Evil"})(handed),
        ),
    ),
    "a class that unpickles": config(tokenizer_class="RagRetriever"),
    "a class of models": config("config.json", tokenizer_class="T5ForConditionalGeneration"),
    "no name of a class": config(tokenizer_class=["T5Tokenizer"]),
    "itself": config(tokenizer_class="AutoTokenizer"),
    "arguments": config(init_inputs=["SECRET"]),
    "gguf": config(gguf_file="SECRET"),
    "sentencepiece": config(sp_model_kwargs={"model_file": "SECRET"}),
    "versions": config(fast_tokenizer_files=["../../../secret"]),
    "a file up": config(vocab_file="../../../secret"),
    "labels": config("config.json", model_type="t5", num_labels=10**9),
    "normalizers": growing("normalizer", "normalizers"),
    "decoders": growing("decoder", "decoders"),
    "tokenizer.json by a link": link("tokenizer.json"),
    "tokenizer_config.json by a link": link("tokenizer_config.json"),
    "a vocabulary by a link": link("vocab.txt"),
    "zeros": link("tokenizer.json", "/dev/zero"),
    "a template by a link": link("additional_chat_templates/x.jinja"),
    "the folder by a link": folder_out,
    "a large tokenizer.json": large("tokenizer.json"),
    "a large vocabulary": large("vocab.txt"),
    "a large template": large("chat_template.jinja"),
    "fifo": fifo,
    "none": lambda handed: shutil.rmtree(handed.shards / "tokenizer"),
    "another vocabulary": lambda handed: shards.load_tokenizer("byte").save_pretrained(
        handed.shards / "tokenizer"
    ),
    "deep": lambda handed: (handed.shards / "tokenizer/tokenizer_config.json").write_text(
        "[" * 10**6
    ),
}


@pytest.fixture
def nothing_ran():
    yield
    assert not Path("ran").exists()


@pytest.mark.parametrize("evil", EVIL)
@pytest.mark.usefixtures("nothing_ran")
def test_an_evil_tokenizer_is_refused(handed, command, evil):
    EVIL[evil](handed)
    done = command("shards", "inspect", "shards", stdin=b"y\n" * 9)
    if (done.code, evil.startswith("remote code")) == (0, True):  # it is passed over
        assert done.deeds == []
    else:
        refusal(done)
        done = command("shards", "verify", "shards", stdin=b"y\n" * 9)
        assert done.deeds == []
        assert done.code in (1, 2)
    (handed.folder / "lines.txt").write_text("x = 1\ny = 2\n" * 9)
    done = command(
        *("shards", "build", "lines.txt", "--out", "new", "--max-length", 9, "--workers", 1),
        *("--tokenizer", "shards/tokenizer"),
        stdin=b"y\n" * 9,
    )
    assert done.deeds == []
    if evil not in ("another vocabulary", "the folder by a link") and "code" not in evil:
        assert done.code == 2


@pytest.mark.parametrize("evil", ["arguments", "a class that unpickles", "a vocabulary by a link"])
def test_so_is_that_of_an_export(handed, refused, evil):
    shutil.rmtree(handed.shards / "tokenizer")
    (handed.shards / "tokenizer").symlink_to(handed.run / "export")
    EVIL[evil](handed)
    refused("reconstruct", "run", "x = 1")


def test_an_evil_tokenizer_does_not_get_into_an_export(handed, refused):
    shutil.rmtree(handed.run / "export")
    EVIL["tokenizer.json by a link"](handed)
    refused("export", "run")
    assert not (handed.run / "export").exists()


def test_a_dataset_in_the_hubs_cache_is_made_of_links_to_its_blobs(handed, honest):
    snapshot, blobs = handed.folder / "hub/snapshots/1", handed.folder / "hub/blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(handed.shards.rglob("*"))):
        copy = snapshot / path.relative_to(handed.shards)
        if path.is_file():
            shutil.copy(path, blobs / str(number))
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(os.path.relpath(blobs / str(number), copy.parent))
    honest("shards", "verify", snapshot)
    honest("shards", "inspect", snapshot)
    (blobs / "0").unlink()
    (blobs / "0").symlink_to(handed.secret)  # blocks.npy
    with pytest.raises(shards.UserError, match="leads out"):
        _ = shards.open_index(snapshot).blocks


OWN = {
    "special_tokens_map_file": "/home/somebody/special_tokens_map.json",
    "tokenizer_file": "/home/somebody/models/tokenizer.json",
    "name_or_path": "/home/somebody/models/t5",
    "init_inputs": [],
    "sp_model_kwargs": {},
    "auto_map": {"AutoModel": "modeling_x.Model"},
}


def test_what_honest_tokenizers_say_of_other_machines_is_passed_over(handed, honest):
    config(**OWN)(handed)
    config("config.json", _name_or_path="/raid/t5", model_type="t5", auto_map=OWN["auto_map"])(
        handed
    )
    honest("shards", "inspect", "shards")
