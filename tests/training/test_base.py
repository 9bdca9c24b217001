"""Runs that start from a pretrained T5."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, T5Config, T5ForConditionalGeneration

from shards import Dataset, open_index
from t5vae.checkpoint.export import export
from t5vae.cluster.ranks import Ranks
from t5vae.config import Config
from t5vae.model import T5VAE, T5VAEConfig
from t5vae.planning.describe import describe, open_if_there
from t5vae.training import build
from t5vae.training.job import resolve
from tests.refused import refusal

TRAIN = Path(__file__).parents[2] / "train.py"
CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, 1, "127.0.0.1", 0)


@pytest.fixture(scope="session")
def base(dataset, tmp_path_factory) -> Path:
    """A T5 v1.1 with the tokenizer of the shards; its embeddings have 20 rows to spare."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(5)
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=320,
            d_model=16,
            d_kv=4,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            dropout_rate=0.1,
        )
    )
    t5.lm_head.weight = torch.nn.Parameter(torch.randn(320, 16))
    t5.save_pretrained(folder)
    open_index(dataset).tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def index(dataset):
    return open_index(dataset)


@pytest.fixture
def from_base(make_config, base):
    def make(**model):
        return make_config(model={"base": str(base), "latent_size": 8, "token_size": 4, **model})

    return make


def model_config(config: Config, index: Dataset) -> T5VAEConfig:
    return build.model_config(config.model, config.objective, index)


def build_model(config: Config, index: Dataset) -> T5VAE:
    settings = model_config(config, index)
    return build.build_model(settings, config.model, seed=0, half=False, device=CPU)


def test_the_sizes_are_the_bases_and_the_vocabulary_is_the_shards(from_base, index):
    made = model_config(from_base(), index)
    assert (made.t5["d_model"], made.t5["num_layers"], made.t5["dropout_rate"]) == (16, 2, 0.1)
    assert made.t5["vocab_size"] == 300
    assert not made.tie_word_embeddings
    assert describe(from_base(), index, 1)["parameters"] == sum(
        p.numel() for p in build_model(from_base(), index).parameters()
    )


def test_a_size_may_repeat_the_bases_and_dropout_may_differ(from_base, index):
    made = model_config(from_base(t5={"d_model": 16, "dropout_rate": 0.0}), index)
    assert made.t5["dropout_rate"] == 0


def test_a_size_that_is_not_the_bases_is_refused_with_both_values(from_base, base, index):
    message = refusal(model_config, from_base(t5={"d_ff": 32}), index)
    for word in ("model.t5.d_ff", "32", "24", str(base)):
        assert word in message


def test_dropout_of_the_configuration_reaches_the_layers(from_base, index):
    model = build_model(from_base(t5={"dropout_rate": 0.25}), index)
    rates = {module.p for module in model.t5.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.25}


def test_shards_of_another_tokenizer_are_refused_before_the_start(make_config, base, other_dataset):
    data = {"shards": str(other_dataset), "global_batch_size": 16}
    config = make_config(data=data, model={"base": str(base)})
    for message in (refusal(resolve, config, ALONE), refusal(open_if_there, config)):
        assert f"--tokenizer {base}" in message


def test_a_missing_base_is_refused_before_the_start(make_config):
    config = make_config(model={"base": "no/such-t5"})
    assert "no/such-t5" in refusal(resolve, config, ALONE)


@pytest.mark.distributed
def test_a_run_starts_from_the_base_and_its_export_needs_the_base_no_more(
    from_base, base, index, tmp_path
):
    moved = shutil.copytree(base, tmp_path / "base")
    config = from_base(base=str(moved))
    file = tmp_path / "config.yaml"
    file.write_text(config.dump())
    settings = ["train.steps=3", "train.precision=fp32", "optim.lr=1e-6", "optim.muon_lr=1e-6"]
    done = subprocess.run(
        [sys.executable, TRAIN, file, *settings, "log.every=1"],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    shutil.rmtree(moved)
    folder, *_ = export(config.run_dir)
    exported = AutoModel.from_pretrained(folder)
    started = load_file(base / "model.safetensors")
    for ours, theirs in (("lm_head", "lm_head"), ("encoder.embed_tokens", "shared")):
        weight = exported.t5.get_parameter(f"{ours}.weight")
        assert not torch.equal(weight, started[f"{theirs}.weight"][:300])
        torch.testing.assert_close(weight, started[f"{theirs}.weight"][:300], rtol=0, atol=1e-4)
    record = json.loads((config.run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert record["step"] == 1
