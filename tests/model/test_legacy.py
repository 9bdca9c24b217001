"""The preset `legacy` against the original T5-VAE's formulas (Greenlee, 2020) in fp64."""

from pathlib import Path

import numpy as np
import pytest
import torch

from t5vae.config import load_config

PRESET = load_config(Path(__file__).parents[2] / "configs" / "legacy.yaml").model
LEGACY = PRESET.model_dump(
    include={"bottleneck", "token_size", "expansion_rank", "squash", "normalize", "mask_padding"}
)
T, D = 9, 6


@pytest.fixture(scope="module")
def legacy(build):
    return build(**LEGACY, sequence_length=T, latent_size=D)


@pytest.fixture(scope="module")
def weights(legacy):
    state = legacy.bottleneck.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "shrink.weight": (100, 16),
        "shrink.bias": (100,),
        "to_latent.weight": (D, 100 * T),
        "to_latent.bias": (D,),
        "from_latent.0.weight": (10 * T, D),
        "from_latent.0.bias": (10 * T,),
        "from_latent.1.weight": (100 * T, 10 * T),
        "from_latent.1.bias": (100 * T,),
        "grow.weight": (16, 100),
        "grow.bias": (16,),
        "feed_forward.DenseReluDense.wi.weight": (24, 16),
        "feed_forward.DenseReluDense.wo.weight": (16, 24),
        "feed_forward.layer_norm.weight": (16,),
    }
    with torch.no_grad():
        state["feed_forward.layer_norm.weight"].uniform_(0.5, 2)
        state["feed_forward.DenseReluDense.wi.weight"].normal_()
        state["feed_forward.DenseReluDense.wo.weight"].normal_()
    return {name: value.numpy() for name, value in state.items()}


def code(states_BTC, weights):
    """Linear d -> 100 for each token, flatten, Linear 100 T -> D, tanh."""
    tokens = states_BTC @ weights["shrink.weight"].T + weights["shrink.bias"]
    flat = tokens.reshape(len(tokens), -1)
    return np.tanh(flat @ weights["to_latent.weight"].T + weights["to_latent.bias"])


def memory(z_BD, weights):
    """Linear D -> 10 T, Linear 10 T -> 100 T, a view, Linear 100 -> d, T5's feed-forward block."""
    thin = z_BD @ weights["from_latent.0.weight"].T + weights["from_latent.0.bias"]
    wide = thin @ weights["from_latent.1.weight"].T + weights["from_latent.1.bias"]
    tokens = wide.reshape(len(z_BD), T, 100)
    x = tokens @ weights["grow.weight"].T + weights["grow.bias"]
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    normed = normed * weights["feed_forward.layer_norm.weight"]
    hidden = np.maximum(normed @ weights["feed_forward.DenseReluDense.wi.weight"].T, 0)
    return x + hidden @ weights["feed_forward.DenseReluDense.wo.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("columns", [T, 7], ids=["padded", "shorter"])
def test_code_is_the_originals_and_the_encoder_sees_the_pads(legacy, weights, ids_BT, columns):
    rows = (ids_BT[:, columns:] == 0).all(1)
    full_BT = ids_BT[rows]
    states_BTC = legacy.t5.encoder(
        input_ids=full_BT, attention_mask=torch.ones_like(full_BT)
    ).last_hidden_state
    z_BD = legacy(full_BT[:, :columns], mode="encode")
    np.testing.assert_allclose(z_BD, code(states_BTC.numpy(), weights), rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_memory_is_the_originals(legacy, weights, z_BD):
    memory_BTC = legacy(latent=z_BD, mode="expand")
    # T5LayerNorm computes its variance in fp32.
    np.testing.assert_allclose(memory_BTC, memory(z_BD.numpy(), weights), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_memory_in_training_is_the_same(legacy, weights, z_BD):
    legacy.train()
    try:
        trained = legacy(latent=z_BD, mode="expand")
    finally:
        legacy.eval()
    assert torch.equal(trained, legacy(latent=z_BD, mode="expand"))


@torch.no_grad()
def test_a_whole_reconstruction_is_the_originals(legacy, weights, ids_BT):
    states_BTC = legacy.t5.encoder(
        input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)
    ).last_hidden_state
    memory_BTC = torch.from_numpy(memory(code(states_BTC.numpy(), weights), weights))
    shifted_BT = torch.cat([torch.zeros_like(ids_BT[:, :1]), ids_BT[:, :-1]], dim=1)
    expected = legacy.t5(encoder_outputs=(memory_BTC,), decoder_input_ids=shifted_BT).logits
    actual = legacy(ids_BT, labels=ids_BT).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
