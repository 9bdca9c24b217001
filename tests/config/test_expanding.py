"""`~` and variables in the paths of a configuration."""

import pytest

from t5vae.common.errors import UserError
from t5vae.config import load_config

PATHS = [
    *("run.output_dir", "data.shards", "data.cache_dir", "model.base", "checkpoint.source"),
    "deepspeed.config",
]


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("SCRATCH", "/scratch/ada")
    monkeypatch.delenv("NO_SUCH", raising=False)


def value(config, key):
    section, leaf = key.split(".")
    return getattr(getattr(config, section), leaf)


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~/a", "/home/ada/a"),
        ("$SCRATCH/a b", "/scratch/ada/a b"),
        ("s3://b${SCRATCH}/a", "s3://b/scratch/ada/a"),
    ],
)
def test_every_path_is_expanded(write, key, written, meant):
    overrides = ["checkpoint.resume=weights"]
    assert value(load_config(write(), [*overrides, f"{key}={written}"]), key) == meant
    section, leaf = key.split(".")
    text = f"{section}: {{{leaf}: '{written}'}}\n"
    path = write(text if section == "data" else f"data: {{shards: a}}\n{text}")
    missing = [] if key == "data.shards" else ["data.shards=a"]
    assert value(load_config(path, [*overrides, *missing]), key) == meant


def test_every_dataset_of_a_mixture_is_expanded(write):
    config = load_config(write(), ["data.shards=[~/a, {path: $SCRATCH/b, weight: 2}]"])
    assert config.data.paths == ["/home/ada/a", "/scratch/ada/b"]


@pytest.mark.parametrize("key", PATHS)
def test_a_variable_that_is_not_set_is_refused_in_one_line_by_key(write, key):
    with pytest.raises(UserError) as caught:
        load_config(write(), ["checkpoint.resume=weights", f"{key}=$NO_SUCH/a"])
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert key in message
    assert "NO_SUCH" in message


def test_what_is_no_path_is_not_expanded(write):
    config = load_config(write(), ["run.name=$NO_SUCH", "eval.check=regex:~$SCRATCH$"])
    assert (config.run.name, config.eval.check) == ("$NO_SUCH", "regex:~$SCRATCH$")


def test_where_the_configuration_lies_is_expanded(write, monkeypatch):
    monkeypatch.setenv("HERE", str(write().parent))
    assert load_config("$HERE/small.yaml").data.shards == "data/lines"
    with pytest.raises(UserError, match="NO_SUCH"):
        load_config("$NO_SUCH/small.yaml")
