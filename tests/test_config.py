import json
from functools import partial
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from t5vae.common.errors import UserError
from t5vae.config import Config, Source, keys, load_config
from tests import refused

refusal = partial(refused.refusal, load_config)

CONFIGS = Path(__file__).parents[1] / "configs"
MINIMAL = "data: {shards: data/lines}\n"


@pytest.fixture
def write(tmp_path):
    """Write a configuration file and return its path."""

    def write_config(text: str = MINIMAL, name: str = "small.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_config


def test_the_shards_folder_is_all_that_must_be_given(write):
    config = load_config(write())
    assert config.data.shards == "data/lines"
    assert config == Config(data={"shards": "data/lines"}, run={"name": "small"})
    assert "data.shards is missing" in refusal(write("data: {}"))
    assert "data is missing" in refusal(write("train: {steps: 5}"))


@pytest.mark.parametrize("seed", [2**64, 2**70, -(2**63) - 1])
def test_a_seed_beyond_64_bits_is_refused(write, seed):
    assert "run.seed" in refusal(write(f"{MINIMAL}run: {{seed: {seed}}}"))


@pytest.mark.parametrize(
    ("key", "default"),
    [
        ("objective.mmd.estimator", "u"),
        ("objective.mmd.prior", "normal"),
        ("objective.mmd.schedule", "constant"),
        ("objective.reconstruction", "mean"),
        ("objective.latent_noise", 1.0),
        ("model.squash", None),
        ("model.mask_padding", True),
        ("data.micro_batch_size", None),
        ("deepspeed.zero_stage", 1),
        ("checkpoint.resume", "auto"),
        ("model.normalize", True),
        ("optim.weight_decay", 0.01),
        ("run.seed", 0),
    ],
)
def test_defaults(write, key, default):
    value = load_config(write())
    for part in key.split("."):
        value = getattr(value, part)
    assert value == default


def test_overrides_are_applied_in_order_over_the_file(write):
    path = write(MINIMAL + "train: {steps: 7, precision: fp32}\n")
    overrides = ["train.steps=9", "objective.mmd.kernel=rbf", "train.steps=11", "optim.lr=1e-4"]
    config = load_config(path, overrides)
    assert config.train.steps == 11
    assert config.train.precision == "fp32"
    assert config.objective.mmd.kernel == "rbf"
    assert config.optim.lr == 1e-4


@pytest.mark.parametrize(
    ("overrides", "minutes", "steps"),
    [
        ([], 5, 7),
        (["train.steps=9"], None, 9),
        (["train.minutes=2"], 2, 7),
        (["train.minutes=2", "train.steps=9"], None, 9),
        (["train.steps=9", "train.minutes=2"], 2, 9),
    ],
)
def test_of_steps_and_minutes_the_later_override_counts(write, overrides, minutes, steps):
    train = load_config(write(MINIMAL + "train: {steps: 7, minutes: 5}\n"), overrides).train
    assert (train.minutes, train.steps) == (minutes, steps)


def test_shards_may_be_a_mixture_of_folders_with_weights(write, tmp_path):
    config = load_config(write(), ["data.shards=[a, {path: s3://b/c, weight: 2.5}]"])
    assert config.data.shards == [Source(path="a"), Source(path="s3://b/c", weight=2.5)]
    (tmp_path / "again.yaml").write_text(config.dump())
    assert load_config(tmp_path / "again.yaml").data == config.data
    for value, message in [
        ("[{path: a, weight: 0}]", "data.shards.mixture.0.weight is 0"),
        ("[{weight: 1}]", "data.shards.mixture.0.path is missing"),
        ("[{path: a, wait: 1}]", "unknown key data.shards.mixture.0.wait"),
        ("[]", "data.shards.mixture is []"),
        ("", "data.shards.path is None"),
    ]:
        assert message in refusal(write(), [f"data.shards={value}"])


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.micro_batch_size=null", "data.micro_batch_size", None),
        ("data.shards=s3://bucket/a=b", "data.shards", "s3://bucket/a=b"),
        ("model.t5={d_model: 32, num_heads: 2}", "model.t5.d_model", 32),
        ("optim.betas=[0.8, 0.9]", "optim.betas", (0.8, 0.9)),
        ("model.gradient_checkpointing=true", "model.gradient_checkpointing", True),
        ("eval.check=regex:^a{2}$", "eval.check", "regex:^a{2}$"),
        ("deepspeed.config={zero: {x: 1}}", "deepspeed.config", {"zero": {"x": 1}}),
    ],
)
def test_an_overrides_value_is_what_its_key_holds(write, override, key, value):
    found = load_config(write(), [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize("override", ["train.steps", "=3", "", "train.steps.deep=3"])
def test_what_is_no_override_is_refused(write, override):
    refusal(write(MINIMAL + "train: {steps: 7}"), [override])


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("train.step", "train.steps"),
        ("trian.steps", "train"),
        ("objective.mmd.kernal", "objective.mmd.kernel"),
        ("objective.mdd.kernel", "objective.mmd"),
        ("model.t5.d_modle", "model.t5.d_model"),
        ("data.batch_size", "data.micro_batch_size"),
        ("model.lr", "optim.lr"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_valid_one(write, wrong, right):
    message = refusal(write(), [f"{wrong}=1"])
    suggestion = message.rpartition("did you mean ")[2]
    assert suggestion.startswith(right), message
    in_file = "data:\n  shards: x\n"
    tree = yaml.safe_load(in_file)
    node = tree
    *sections, leaf = wrong.split(".")
    for section in sections:
        node = node.setdefault(section, {})
    node[leaf] = 1
    assert refusal(write(yaml.safe_dump(tree))).rpartition("did you mean ")[2] == suggestion


@pytest.mark.parametrize(
    "override",
    [
        "data.global_batch_size=1",
        "data.micro_batch_size=0",
        "model.latent_size=0",
        "model.t5.dropout_rate=1.5",
        "model.t5.num_heads=-1",
        "model.bottleneck=linear",
        "model.squash=relu",
        "model.vocab_size=3",
        "objective.mmd.kernel=cubic",
        "objective.mmd.prior=cauchy",
        "objective.mmd.estimator=w",
        "objective.mmd.sigma=0",
        "objective.mmd.sigma=.nan",
        "objective.mmd.weight=-1",
        "objective.mmd.weight=.inf",
        "objective.kl.weight=-1",
        "objective.kl.free_bits=-1",
        "objective.kl.cycles=0",
        "model.posterior=laplace",
        "objective.latent_noise=-0.1",
        "objective.latent_noise=.nan",
        "objective.word_dropout=2",
        "optim.lr=0",
        "optim.lr=fast",
        "optim.lr=.inf",
        "optim.betas=[0.9]",
        "optim.betas=[0.9, 1.5]",
        "optim.warmup=1.1",
        "train.steps=0",
        "train.steps=1.5",
        "train.precision=fp8",
        "deepspeed.zero_stage=4",
        "checkpoint.every=-1",
        "checkpoint.keep_last=0",
        "checkpoint.resume=always",
        "log.every=0",
        "launcher.nodes=0",
    ],
)
def test_a_value_out_of_range_is_refused_by_key(write, override):
    key = override.partition("=")[0]
    assert key in refusal(write(), [override])


def test_every_mistake_is_named_in_the_same_line(write):
    message = refusal(write(), ["train.steps=0", "optim.speed=3", "model.latent_size=-1"])
    for key in ("train.steps", "optim.speed", "model.latent_size"):
        assert key in message


def test_a_batch_that_micro_batches_do_not_fill_is_refused(write):
    message = refusal(write(), ["data.global_batch_size=100", "data.micro_batch_size=48"])
    assert "100" in message
    assert "48" in message


def test_tanh_under_a_wide_prior_is_refused_but_for_the_legacy_kernel(write):
    assert "tanh" in refusal(write(), ["model.squash=tanh"])
    load_config(write(), ["model.squash=tanh", "objective.mmd.kernel=legacy"])
    load_config(write(), ["model.squash=tanh", "objective.mmd.sigma=0.3"])
    load_config(write(), ["model.squash=tanh", "objective.mmd.prior=uniform"])
    load_config(write(), ["model.squash=tanh", "objective.mmd.weight=0"])


def test_epps_pulley_without_a_direction_is_refused(write):
    none = ["objective.epps_pulley.slices=0", "objective.epps_pulley.axes=false"]
    assert "slices" in refusal(write(), [*none, "objective.epps_pulley.weight=1"])
    load_config(write(), none)


def test_a_term_that_needs_a_posterior_is_refused_without_one(write):
    assert "needs model.posterior gaussian" in refusal(write(), ["objective.kl.weight=1"])
    posterior = ["model.posterior=gaussian", "model.normalize=false"]
    load_config(write(), [*posterior, "objective.kl.weight=1"])
    load_config(write(), posterior)
    for changed in ("model.normalize=true", "model.squash=tanh"):
        assert "model.normalize to false" in refusal(write(), [*posterior, changed])


def test_clipping_under_muon_is_refused(write):
    assert "muon" in refusal(write(), ["optim.name=muon", "optim.gradient_clipping=1"])
    load_config(write(), ["optim.name=muon"])
    load_config(write(), ["optim.name=muon", "optim.gradient_clipping=0"])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"   \n# nothing\n",
        b"just a text",
        b"- a\n- list\n",
        b"42",
        b"data: {shards: x",
        b"data:\n\tshards: x",
        b"data: !!python/object:os.system {}",
        b"data: *missing",
        b"? [a]\n: b\n",
        b"1: 2\n",
        b"data: [x]\n",
        b"data: x\n",
        b"data:\n",
        b"\x00\x01\x02\xff\xfe",
        b"\x80\x81",
        bytes(range(256)),
        b"train: {steps: 0x_}\ndata: {shards: x}",  # yaml: a number that is none
        b"data: {shards: x}\ntrain: =",
        b"data: {shards: x}\ndeepspeed: {config: {a: =}}",
        b'"a\\nb": 1\n' + MINIMAL.encode(),
        b'data: {shards: x, "a\\nb\\u2028c": 1}',
        b"&a {data: *a}",
        b"data: {shards: x}\ntrain: {steps: 5}\nsurprise: {}",
    ],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_line_that_names_it(tmp_path, content):
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    assert "odd.yaml" in refusal(path)


def test_a_missing_file_or_a_folder_is_refused_in_one_line(tmp_path):
    assert "quickstart" in refusal(tmp_path / "none.yaml")
    assert str(tmp_path) in refusal(tmp_path)
    refusal(tmp_path / "none.yaml" / "deeper.yaml")


def test_a_deeply_nested_file_is_refused(tmp_path):
    path = tmp_path / "deep.yaml"
    path.write_text("[" * 5000)
    refusal(path)


def loads_or_refuses(path, overrides=()):
    message = ""
    try:
        load_config(path, overrides)
    except UserError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_load_or_are_refused_in_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    loads_or_refuses(path)


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(keys()) | st.text(max_size=12), value=st.text(max_size=12))
@example(key="run.name", value="2024-99-99")
@example(key="a\nb", value="1")
@example(key="data.shards.a\nb.c", value="1")
@example(key="run.name", value="0b_")
def test_any_override_loads_or_is_refused_in_one_line(tmp_path_factory, key, value):
    path = tmp_path_factory.getbasetemp() / "fine.yaml"
    path.write_text(MINIMAL)
    loads_or_refuses(path, [f"{key}={value}"])


def test_a_configuration_is_frozen(write):
    config = load_config(write())
    with pytest.raises(ValidationError):
        config.train.steps = 3
    with pytest.raises(ValidationError):
        config.train = None
    assert config == load_config(write())


@settings(deadline=None)
@given(micro=st.integers(1, 16), accumulation=st.integers(1, 8), world=st.integers(1, 16))
def test_micro_batches_times_accumulation_times_ranks_is_the_global_batch(
    micro, accumulation, world
):
    batch = max(2, micro * accumulation * world)
    data = {"shards": "x", "global_batch_size": batch, "micro_batch_size": micro}
    if batch == micro * accumulation * world:
        assert Config(data=data).data.split(world).accumulation == accumulation
    del data["micro_batch_size"]
    if batch % world == 0:
        assert Config(data=data).data.split(world).accumulation == 1


@pytest.mark.parametrize(
    ("batch", "micro", "world", "named"),
    [(256, None, 3, "3 ranks"), (256, 32, 3, "3 ranks"), (96, 32, 2, "64"), (64, 64, 2, "128")],
)
def test_a_batch_that_ranks_cannot_share_is_refused_in_one_line(batch, micro, world, named):
    data = {"shards": "x", "global_batch_size": batch, "micro_batch_size": micro}
    with pytest.raises(UserError) as caught:
        Config(data=data).data.split(world)
    assert len(str(caught.value).splitlines()) == 1
    assert str(batch) in str(caught.value)
    assert named in str(caught.value)


@settings(max_examples=40, deadline=None)
@given(
    shards=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    name=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), min_size=1),
    lr=st.floats(1e-12, 1e3),
    seed=st.integers(-(2**63), 2**64 - 1),
    config=st.none() | st.text(max_size=9) | st.dictionaries(st.text(), st.integers()),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    micro=st.sampled_from([None, 1, 16]),
)
def test_a_dumped_configuration_loads_as_the_same(
    tmp_path_factory, shards, name, lr, seed, config, betas, micro
):
    whole = Config(
        run={"name": name, "seed": seed},
        data={"shards": shards, "micro_batch_size": micro},
        optim={"lr": lr, "betas": betas},
        deepspeed={"config": config},
    )
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(whole.dump(), encoding="utf-8")
    assert load_config(path) == whole


def test_a_runs_name_and_folder_come_from_the_file_unless_given(write):
    config = load_config(write(name="lines.of.code.yaml"))
    assert config.run.name == "lines.of.code"
    assert config.run_dir == Path("runs/lines.of.code")
    assert load_config(write(), ["run.name=other"]).run_dir == Path("runs/other")
    placed = load_config(write(), ["run.output_dir=/scratch/a"])
    assert placed.run_dir == Path("/scratch/a")
    assert placed.run.name == "small"


def test_keys_lists_every_leaf(write):
    tree = load_config(write()).model_dump()

    def leaves(node, prefix=""):
        for name, value in node.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name

    assert sorted(keys()) == sorted(leaves(tree))


def test_every_key_is_explained_or_plain(write):
    schema = json.dumps(Config.model_json_schema())
    assert "Sequences in one optimiser step" in schema


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_of_the_project_loads(path):
    config = load_config(path)
    assert config.run.name
    assert config.data.split(1).accumulation >= 1


@pytest.mark.parametrize(
    ("time", "minutes"),
    [
        ("90", 90),
        ("24:00:00", 1440),
        ("1:30:00", 90),
        ("00:20:00", 20),
        ("00:00:30", 1),
        ("30:00", 30),
        ("30:01", 31),
        ("2-12", 3600),
        ("1-2:30", 1590),
        ("1-02:30:00", 1590),
    ],
)
def test_a_time_limit_may_be_written_as_slurm_does(write, time, minutes):
    by_file = write(MINIMAL + f"launcher:\n  time: {time}\n")
    assert load_config(by_file).launcher.time == minutes
    assert load_config(write(), [f"launcher.time={time}"]).launcher.time == minutes


@pytest.mark.parametrize("time", ["soon", "0", "-5", "1:2:3:4", "1-2-3", "''"])
def test_what_is_no_time_limit_is_refused(write, time):
    assert "launcher.time" in refusal(write(), [f"launcher.time={time}"])
