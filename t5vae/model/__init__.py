"""T5VAE, a transformers model."""

from t5vae.model.base import check_tokenizer, read_base, t5_settings
from t5vae.model.configuration import T5VAEConfig
from t5vae.model.flops import flops_per_token, parameter_counts, training_flops
from t5vae.model.modeling import T5VAE, T5VAEOutput
from t5vae.model.noise import Regularisers, row_keys

__all__ = [
    "T5VAE",
    "Regularisers",
    "T5VAEConfig",
    "T5VAEOutput",
    "check_tokenizer",
    "flops_per_token",
    "parameter_counts",
    "read_base",
    "row_keys",
    "t5_settings",
    "training_flops",
]
