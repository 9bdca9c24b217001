"""Pretrained bases, with configurations as they are published and weights drawn here."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, BartConfig, ByT5Tokenizer, T5EncoderModel

from shards.format.tokenizers import train_tokenizer
from t5vae.model import T5VAE, T5VAEConfig, check_tokenizer, read_base, t5_settings
from tests.refused import refusal

LINES = [f"value_{i} = function_{i % 7}(a, {i})" for i in range(200)]
COMMON = {
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "use_cache": True,
    "vocab_size": 320,
}
UNTIED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
PUBLISHED = {
    "t5": {"model_type": "t5", "n_positions": 512, "architectures": ["T5WithLMHeadModel"]},
    "t5-v1.1": {"model_type": "t5", "output_past": True, **UNTIED},
    "flan-t5": {"model_type": "t5", "n_positions": 512, **UNTIED},
    "byt5": {
        "model_type": "t5",
        "tokenizer_class": "ByT5Tokenizer",
        "gradient_checkpointing": False,
        **UNTIED,
        "vocab_size": 384,
    },
    "mt5": {"model_type": "mt5", "tokenizer_class": "T5Tokenizer", **UNTIED},
    "umt5": {"model_type": "umt5", "scalable_attention": True, **UNTIED},
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(LINES, 300)


@pytest.fixture(scope="module")
def publish(tmp_path_factory, tokenizer):
    """A folder as a hub would serve it, for a name of PUBLISHED."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name in folders:
            return folders[name]
        folder = folders[name] = tmp_path_factory.mktemp(name)
        settings = {**COMMON, **PUBLISHED[name]}
        (folder / "config.json").write_text(json.dumps(settings))
        (ByT5Tokenizer() if name == "byt5" else tokenizer).save_pretrained(folder)
        torch.manual_seed(3)
        t5 = AutoModelForSeq2SeqLM.from_config(T5VAEConfig(t5=settings).t5_config)
        weights = {k: v for k, v in t5.state_dict().items() if "embed_tokens" not in k}
        del weights["lm_head.weight"]
        if name != "t5":
            weights["lm_head.weight"] = torch.randn_like(weights["shared.weight"])
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def around(base: Path, vocab_size: int, **config) -> T5VAE:
    t5, tied = read_base(str(base))
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    settings = T5VAEConfig(
        t5={**t5, **ids, "vocab_size": vocab_size},
        tie_word_embeddings=tied,
        latent_size=6,
        sequence_length=9,
        token_size=4,
        **config,
    )
    return T5VAE.from_base(settings, str(base)).eval()


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_a_published_t5_lives_on_inside(publish, name, ids_BT, tmp_path):
    base = publish(name)
    file = load_file(base / "model.safetensors")
    rows = 384 if name == "byt5" else 300
    model = around(base, rows, bottleneck="attention")
    state = model.t5.state_dict()
    for key, value in file.items():
        assert torch.equal(state[key], value[:rows] if value.shape[0] > rows else value), key
    assert model.config.tie_word_embeddings == (name == "t5")

    z_BD = model(ids_BT, mode="encode")
    memory = model(latent=z_BD, mode="expand")
    shifted_BT = torch.nn.functional.pad(ids_BT[:, :-1], (1, 0))
    whole = AutoModelForSeq2SeqLM.from_pretrained(base)
    states_BTC = whole.decoder(shifted_BT, encoder_hidden_states=memory).last_hidden_state
    head_VC = file["shared.weight"] * 16**-0.5 if name == "t5" else file["lm_head.weight"]
    logits_BTV = model(latent=z_BD, labels=ids_BT).logits
    torch.testing.assert_close(
        logits_BTV, (states_BTC @ head_VC.T)[..., :rows], rtol=1e-4, atol=1e-4
    )
    encoder = whole.encoder(ids_BT, attention_mask=(ids_BT != 0).long()).last_hidden_state
    compressed = model.bottleneck.compress(encoder, (ids_BT != 0).long())
    torch.testing.assert_close(z_BD, compressed, rtol=1e-4, atol=1e-4)

    model.save_pretrained(tmp_path)
    loaded = T5VAE.from_pretrained(tmp_path)
    assert torch.equal(loaded(latent=z_BD, labels=ids_BT).logits, logits_BTV)
    assert (loaded.t5.lm_head.weight is loaded.t5.shared.weight) == (name == "t5")
    assert loaded.t5.encoder.embed_tokens.weight is loaded.t5.shared.weight
    loaded.tie_weights()
    assert torch.equal(loaded(latent=z_BD, labels=ids_BT).logits, logits_BTV)


@pytest.mark.parametrize("name", ["t5", "t5-v1.1"])
def test_a_base_that_transformers_5_saved_again_is_the_same(publish, name, tmp_path, ids_BT):
    base = publish(name)
    AutoModelForSeq2SeqLM.from_pretrained(base).save_pretrained(tmp_path)
    assert read_base(str(tmp_path)) == read_base(str(base))
    z_BD = torch.randn(len(ids_BT), 6)
    torch.manual_seed(0)
    first = around(base, 320)(latent=z_BD, labels=ids_BT).logits
    torch.manual_seed(0)
    assert torch.equal(around(tmp_path, 320)(latent=z_BD, labels=ids_BT).logits, first)


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_embeddings_grow_and_shrink_with_the_vocabulary_and_keep_their_rows(publish, name):
    model = around(publish(name), 330)
    known = load_file(publish(name) / "model.safetensors")["shared.weight"]
    assert torch.equal(model.get_input_embeddings().weight[:320], known)
    assert model.get_output_embeddings().weight.shape == (330, 16)
    model.resize_token_embeddings(310)
    assert torch.equal(model.get_input_embeddings().weight, known[:310])
    assert model.config.t5["vocab_size"] == 310
    assert model(torch.tensor([[309, 1]]), mode="score").nll.isfinite().all()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name == "t5")


def test_the_settings_of_a_t5_are_whole_and_say_the_same_again():
    settings = t5_settings({"d_model": 32})
    assert settings["num_decoder_layers"] == settings["num_layers"] == 6
    assert t5_settings(settings) == settings


def test_the_tokenizer_of_the_shards_may_only_add_to_that_of_the_base(publish, tokenizer, tmp_path):
    base = str(publish("t5"))
    check_tokenizer(base, tokenizer, "shards")
    longer = train_tokenizer(LINES, 300)
    longer.add_tokens(["<extra>"])
    check_tokenizer(base, longer, "shards")
    other = train_tokenizer(["completely different words, and more of them"] * 9, 300)
    message = refusal(check_tokenizer, base, other, "data/lines")
    assert "data/lines" in message
    assert f"--tokenizer {base}" in message
    assert "pieces have other numbers" in message
    assert "ByT5" not in refusal(check_tokenizer, base, ByT5Tokenizer(), "data/lines")
    check_tokenizer(str(publish("byt5")), ByT5Tokenizer(), "data/lines")
    (tmp_path / "config.json").write_text((Path(base) / "config.json").read_text())
    assert str(tmp_path) in refusal(check_tokenizer, str(tmp_path), tokenizer, "data/lines")


def test_what_is_no_t5_is_refused(tmp_path):
    assert "nowhere" in refusal(read_base, "nowhere/at-all")
    assert str(tmp_path) in refusal(read_base, str(tmp_path))
    (tmp_path / "config.json").write_bytes(b"\x00\xff")
    assert str(tmp_path) in refusal(read_base, str(tmp_path))
    BartConfig().save_pretrained(tmp_path)
    assert "'bart'" in refusal(read_base, str(tmp_path))


def test_weights_that_are_missing_cut_or_of_another_shape_are_refused(publish, tmp_path):
    base = publish("t5")
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    assert str(tmp_path) in refusal(around, tmp_path, 320)
    whole = (base / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert str(tmp_path) in refusal(around, tmp_path, 320)
    T5EncoderModel.from_pretrained(base).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    assert "not a whole T5: it has no decoder" in refusal(around, tmp_path, 320)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = torch.randn(320, 16)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "tie_word_embeddings" in refusal(around, tmp_path, 320)
    weights = {**load_file(base / "model.safetensors"), "shared.weight": torch.randn(320, 8)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "shared.weight has the shape [320, 8]" in refusal(around, tmp_path, 320)
