import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel

from t5vae.model import T5VAE, T5VAEConfig
from t5vae.model.files import check


@pytest.mark.parametrize("architecture", ["t5", "t5-v1.1", "mt5", "umt5"])
@pytest.mark.parametrize("bottleneck", ["flatten", "attention"])
def test_a_loaded_model_is_the_one_that_was_saved(
    build, ids_BT, tmp_path, bottleneck, architecture
):
    model = build(architecture, bottleneck=bottleneck)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is T5VAE
    assert loaded.config.to_dict() == T5VAE.from_pretrained(tmp_path).config.to_dict()
    assert not loaded.training
    saved, state = model.state_dict(), loaded.state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    score = model(ids_BT, mode="score")
    assert torch.equal(loaded(ids_BT, mode="score").nll, score.nll)


def test_the_attention_asked_for_is_the_t5s(build, tmp_path):
    build().save_pretrained(tmp_path)
    for name in ("eager", "sdpa"):
        model = AutoModel.from_pretrained(tmp_path, attn_implementation=name)
        assert model.t5.encoder.config._attn_implementation == name
        assert model.t5.decoder.config._attn_implementation == name


def test_weights_in_several_files_load_as_one(build, ids_BT, tmp_path):
    model = build("mt5")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModel.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.float64
    assert torch.equal(loaded(ids_BT, mode="score").nll, model(ids_BT, mode="score").nll)


def test_a_missing_bottleneck_is_drawn_as_a_new_models(build, tmp_path):
    model = build()
    model.save_pretrained(
        tmp_path,
        state_dict={k: v for k, v in model.state_dict().items() if "bottleneck" not in k},
    )
    loaded = T5VAE.from_pretrained(tmp_path)
    for name, value in loaded.bottleneck.named_parameters():
        if value.dim() > 1:
            assert 0.5 < value.std() / model.bottleneck.get_parameter(name).std() < 2, name


def test_tied_embeddings_stay_tied_and_are_saved_once(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    assert shapes.count(list(model.get_input_embeddings().weight.shape)) == 1
    for one in (model, T5VAE.from_pretrained(tmp_path)):
        assert one.get_input_embeddings().weight is one.get_output_embeddings().weight


def test_embeddings_that_differ_as_in_t5_v1_1_are_both_saved(build, tmp_path):
    model = build("t5-v1.1")
    head = torch.nn.Parameter(torch.randn_like(model.get_output_embeddings().weight))
    model.get_output_embeddings().weight = head
    model.save_pretrained(tmp_path)
    loaded = T5VAE.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(loaded.get_output_embeddings().weight, head)
    embedding = model.get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, embedding)


def test_the_length_of_a_generation_is_saved_with_the_generation_configuration(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    assert "max_length" not in json.loads((tmp_path / "config.json").read_text())
    loaded = T5VAE.from_pretrained(tmp_path)
    assert loaded.config.sequence_length == model.config.sequence_length
    # The start token comes before the T tokens of a sequence.
    assert loaded.generation_config.max_length == model.config.sequence_length + 1
    assert loaded.generation_config.eos_token_id == 1
    assert loaded.generation_config.pad_token_id == 0
    assert loaded.generation_config.decoder_start_token_id == 0


def test_every_field_of_a_configuration_survives_saving(tmp_path):
    fields = {
        "latent_size": 3,
        "sequence_length": 7,
        "bottleneck": "flatten",
        "token_size": 4,
        "expansion_rank": 2,
        "memory_length": 5,
        "squash": "tanh",
        "normalize": True,
        "mask_padding": False,
    }
    t5 = {"d_model": 16, "d_kv": 4, "vocab_size": 24, "feed_forward_proj": "gated-gelu"}
    T5VAEConfig(t5=t5, **fields).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in fields} == fields
    assert {name: getattr(loaded.t5_config, name) for name in t5} == t5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bottleneck", "linear"),
        ("squash", "relu"),
        ("latent_size", 0),
        ("sequence_length", 0),
        ("token_size", -1),
        ("memory_length", 0),
        ("expansion_rank", 0),
    ],
)
def test_an_impossible_configuration_is_a_value_error(field, value):
    with pytest.raises(ValueError, match=field):
        T5VAEConfig(**{field: value})


@pytest.mark.parametrize("token", [None, -1, 10**6])
@pytest.mark.parametrize("name", ["pad_token_id", "eos_token_id"])
def test_a_configuration_without_a_token_that_is_needed_is_refused(build, name, token):
    model = build()
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    check(model.config, shapes)
    model.config.t5[name] = token
    with pytest.raises(ValueError, match=f"{name} is {token!r}, which is no piece's"):
        check(model.config, shapes)
