"""Tiny models in fp64, so that equality means equality of formulas."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from t5vae.model import T5VAE, T5VAEConfig

T5 = {
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
SEQUENCE_LENGTH = 9
LATENT_SIZE = 6
ARCHITECTURES = {
    "t5": {},
    "t5-v1.1": {"feed_forward_proj": "gated-gelu"},
    "mt5": {"model_type": "mt5", "feed_forward_proj": "gated-gelu"},
    "umt5": {"model_type": "umt5", "feed_forward_proj": "gated-gelu"},
}


@pytest.fixture(scope="session")
def build() -> Callable[..., T5VAE]:
    """A model in fp64, random weights; but T5's, with an output layer of its own."""

    def build_model(
        architecture: str = "t5", vocab_size: int = 26, t5: dict | None = None, **config
    ) -> T5VAE:
        torch.manual_seed(0)
        config = {
            "latent_size": LATENT_SIZE,
            "sequence_length": SEQUENCE_LENGTH,
            "token_size": 5,
            "tie_word_embeddings": architecture == "t5",
            **config,
        }
        t5 = {**T5, **ARCHITECTURES[architecture], "vocab_size": vocab_size, **(t5 or {})}
        return T5VAE(T5VAEConfig(t5=t5, **config)).double().eval()

    return build_model


@pytest.fixture(scope="session", params=["flatten", "attention"])
def model(request: pytest.FixtureRequest, build: Callable[..., T5VAE]) -> T5VAE:
    """One model for each bottleneck. Not to be changed."""
    return build(bottleneck=request.param)


@pytest.fixture(scope="session", name="ids_BT")
def padded_sequences() -> Tensor:
    """Sequences of 1 to T tokens, each ending in the end token, padded to T."""
    generator = torch.Generator().manual_seed(1)
    lengths = [9, 1, 4, 7, 2, 9]
    ids_BT = torch.zeros(len(lengths), SEQUENCE_LENGTH, dtype=torch.int64)
    for row, length in zip(ids_BT, lengths, strict=True):
        row[: length - 1] = torch.randint(2, 24, (length - 1,), generator=generator)
        row[length - 1] = 1
    return ids_BT


@pytest.fixture(scope="session", name="z_BD")
def codes() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return 3 * torch.randn(8, LATENT_SIZE, generator=generator, dtype=torch.float64)


@pytest.fixture
def padded_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models compute pads, as on an accelerator."""
    monkeypatch.setattr(T5VAE, "_packs", lambda *_: False)
