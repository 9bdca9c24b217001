"""What is typed, or stands in YAML, at keys that hold text; and keys that are given twice."""

from functools import partial

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from t5vae.common.errors import UserError
from t5vae.config import load_config, read_values
from t5vae.training.deepspeed_settings import deepspeed_config
from tests import refused

refusal = partial(refused.refusal, load_config)


def value(config, key):
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


TEXTS = [
    *("runs/exp #1", "a: b", "2026-11-29", "2024-99-99", "on", "No", "007", "0x_", "1e5", "~a"),
    *("'a'", '"a"', " a ", "[a", "{a", "&a", "*a", "!a", "%a", "a, b", "---", "=", "<<", "NULL"),
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", ["run.name", "eval.check", "launcher.partition"])
def test_a_key_that_holds_text_takes_what_is_typed(write, key, text):
    assert value(load_config(write(), [f"{key}={text}"]), key) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=12))
@example(text="[a] #b")
def test_any_text_is_taken_as_it_is(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_text("data: {shards: data/lines}\n")
    found = load_config(path, [f"eval.check={text}"]).eval.check
    assert found == (None if text in ("", "null") else text)


@pytest.mark.parametrize("text", ["runs/exp #1", "007", "on", "[a", "a: b", "2026-11-29"])
@pytest.mark.parametrize("key", ["run.output_dir", "data.shards", "deepspeed.config", "model.base"])
def test_a_key_that_holds_a_path_takes_what_is_typed(write, key, text):
    assert value(load_config(write(), [f"{key}={text}"]), key) == text


@pytest.mark.parametrize("nothing", ["", "null"])
@pytest.mark.parametrize(
    ("key", "empty"),
    [
        ("run.output_dir", ""),
        ("run.name", "small"),
        ("eval.check", None),
        ("train.precision", None),
        ("model.base", None),
        ("deepspeed.config", None),
    ],
)
def test_what_may_be_empty_is_emptied(write, key, empty, nothing):
    given = write("data: {shards: a}\nrun: {output_dir: b, name: c}\neval: {check: python}\n")
    assert value(load_config(given, [f"{key}={nothing}"]), key) == empty


@pytest.mark.parametrize("key", ["data.shards", "optim.name", "eval.measure"])
def test_what_may_not_be_empty_is_refused_by_key(write, key):
    assert key in refusal(write(), [f"{key}="])


@pytest.mark.parametrize(
    ("typed", "shards"),
    [
        ("[a #1", "[a #1"),
        ("[a, 007]", ["a", "007"]),
        ("[{path: on, weight: 2}, 2026-11-29]", ["on", "2026-11-29"]),
        ("- a", "- a"),
        ("7", "7"),
    ],
)
def test_what_begins_with_a_bracket_and_is_a_list_is_one(write, typed, shards):
    data = load_config(write(), [f"data.shards={typed}"]).data
    assert data.paths == (shards if isinstance(shards, list) else [shards])
    assert isinstance(data.shards, list) is isinstance(shards, list)


@pytest.mark.parametrize(
    ("typed", "held"),
    [
        ("2026-11-29", "2026-11-29"),
        ("a #b", "a #b"),
        ("16:00", "16:00"),
        ("007", "007"),
        ("1.50", "1.50"),
        ("12", 12),
        ("on", True),
        ("false", False),
    ],
)
def test_an_option_of_sbatch_is_a_number_or_a_switch_or_text(write, typed, held):
    given = [f"launcher.slurm.x={typed}"]
    assert load_config(write(), given).launcher.slurm == {"x": held}
    assert type(load_config(write(), given).launcher.slurm["x"]) is type(held)


def test_a_leaf_is_put_where_there_was_nothing(write):
    path = write("data: {shards: a}\nlauncher: {slurm: null}\ntrain:\n")
    config = load_config(path, ["launcher.slurm.comment=x", "train.steps=3"])
    assert (config.launcher.slurm, config.train.steps) == ({"comment": "x"}, 3)


def test_items_of_text_are_text(write):
    config = load_config(write(), ["launcher.setup=[module load cuda, on, 1, 2026-11-29]"])
    assert config.launcher.setup == ["module load cuda", "on", "1", "2026-11-29"]


def test_plain_text_in_a_file_is_text_where_text_is_held(write):
    path = write(
        "run: {name: 2026-11-29, output_dir: 007}\n"
        "data: {shards: [1.50, {path: on}], cache_dir: ~}\n"
        "eval: {check: off, measure: 0x_}\n"
        "launcher: {partition: 12, mem: 0, exclude: null, setup: [yes], slurm: {a: 01, b: 1}}\n"
        "deepspeed: {config: {1: on, a: 2026-11-29, b: 0.5}}\n"
    )
    config = load_config(path)
    assert (config.run.name, config.run.output_dir) == ("2026-11-29", "007")
    assert (config.data.paths, config.data.cache_dir) == (["1.50", "on"], None)
    assert (config.eval.check, config.eval.measure) == ("off", "0x_")
    place = config.launcher
    assert (place.partition, place.mem, place.exclude) == ("12", "0", None)
    assert (place.setup, place.slurm) == (["yes"], {"a": "01", "b": 1})
    assert config.deepspeed.config == {"1": True, "a": "2026-11-29", "b": 0.5}


def test_anchors_and_merged_mappings_are_read_by_where_they_stand(write):
    path = write(
        "data: &data {shards: 007, global_batch_size: &n 0100}\n"
        "run: {name: *n, seed: *n}\n"
        "launcher: {slurm: &s {a: on}}\n"
        "deepspeed: {config: {<<: [*s, {b: &b [*n]}], a: 1, c: *b}}\n"
    )
    config = load_config(path)
    assert (config.data.shards, config.data.global_batch_size) == ("007", 100)
    assert (config.run.name, config.run.seed) == ("0100", 100)
    assert config.launcher.slurm == {"a": True}
    assert config.deepspeed.config["a"] == 1
    assert config.deepspeed.config["b"] == config.deepspeed.config["c"]


@pytest.mark.parametrize(
    "text",
    [
        "data: &a {shards: *a}",
        "&a {<<: *a, data: {shards: x}}",
        "data: {shards: x}\nobjective: &a {mmd: *a}",
        "data: {shards: x}\ndeepspeed: {config: {a: &a [*a]}}",
        "data: {shards: &a [*a]}",
    ],
)
def test_what_holds_itself_is_refused_in_one_line(write, text):
    refusal(write(text))


def test_aliases_of_aliases_are_read_once(write):
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))]
    refusal(write("data: {shards: x}\nodd:\n" + "".join(f"  {line}\n" for line in lines)))


@pytest.mark.parametrize(
    ("typed", "number"), [("0100", 100), ("-010", -10), ("010_0", 100), ("0x10", 16), ("0", 0)]
)
def test_a_number_with_zeros_before_it_is_that_number(write, typed, number):
    assert load_config(write(), [f"run.seed={typed}"]).run.seed == number
    path = write(f"data: {{shards: a}}\nrun: {{seed: {typed}}}\n")
    assert load_config(path).run.seed == number


@pytest.mark.parametrize("override", ["run.seed=on", "optim.lr=yes", "deepspeed.zero_stage=true"])
def test_a_switch_is_no_number(write, override):
    key, _, typed = override.partition("=")
    assert f"{key} is {typed!r}" in refusal(write(), [override])
    section, leaf = key.split(".")
    assert key in refusal(write(f"data: {{shards: a}}\n{section}: {{{leaf}: {typed}}}\n"))


def test_settings_are_taken_as_they_are_and_win(write):
    given = {"run.name": "'on' #1", "train.steps": 5, "launcher.setup": ["a: b"]}
    config = load_config(write(), ["run.name=a", "train.minutes=3"], given)
    assert (config.run.name, config.train.steps) == ("'on' #1", 5)
    assert (config.train.minutes, config.launcher.setup) == (None, ["a: b"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "data: {shards: x}\ntrain:\n  steps: 5\ntrain: {spike: 3}\n",
            "section train, lines 2 and 4",
        ),
        ("train:\n  steps: 5\n  spike: 3\n  steps: 6\n", "key train.steps, lines 2 and 4"),
        ("data:\n  shards:\n  - path: a\n    path: b\n", "key data.shards.0.path, lines 3 and 4"),
        ("deepspeed: {config: {a: {b: 1, b: 2}}}\n", "key deepspeed.config.a.b, line 1"),
        ("data: {shards: x}\n\n'data': {shards: y}\n", "section data, lines 1 and 3"),
        ("objective:\n  mmd: {}\n  kl: {}\n  mmd:\n", "section objective.mmd, lines 2 and 4"),
    ],
)
def test_a_key_given_twice_is_refused_with_both_lines(write, text, says):
    what, _, where = says.partition(", ")
    assert refusal(write(text)).endswith(f"the {what} is given twice, in {where}: keep one")


@pytest.mark.parametrize(
    "text",
    ['{"a": 1, "b": 2, "a": 1}', '{"b": {"c": {"a": 1, "a": {}}}}', '{"b": [{"a": 1, "a": 2}]}'],
)
def test_a_key_given_twice_in_deepspeeds_own_file_is_refused(write, tmp_path, text):
    (tmp_path / "ds.json").write_text(text)
    config = load_config(write(), [f"deepspeed.config={tmp_path}/ds.json"])
    with pytest.raises(UserError, match=r"ds\.json.* a is given twice") as caught:
        deepspeed_config(config.deepspeed, config.optim, None, config.data.split(1))
    assert len(str(caught.value).splitlines()) == 1


def test_a_key_given_twice_in_an_override_is_refused(write):
    assert "model.t5.d_ff is given twice" in refusal(write(), ["model.t5={d_ff: 1, d_ff: 2}"])


@pytest.mark.parametrize(
    ("key", "typed", "values"),
    [
        ("eval.check", "regex:a b,regex:c #d", ["regex:a b", "regex:c #d"]),
        ("eval.check", "regex:[a-z]+: .*, python,null", ["regex:[a-z]+: .*", "python", None]),
        ("eval.check", '"regex:a{1,2}",json', ["regex:a{1,2}", "json"]),
        ("run.seed", "1, 02", [1, 2]),
        ("optim.lr", "1e-3,0.01", ["1e-3", 0.01]),
        ("optim.betas", "[0.8,0.9],[0.9,0.98]", [[0.8, 0.9], [0.9, 0.98]]),
        ("data.shards", "007,2026-11-29", ["007", "2026-11-29"]),
        ("data.shards", "a,[on, b]", ["a", ["on", "b"]]),
        ("model.compile", "on,off", [True, False]),
    ],
)
def test_values_with_commas_between_them_are_read_one_by_one(key, typed, values):
    assert read_values(typed, key) == values
