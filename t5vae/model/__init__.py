"""T5VAE, a transformers model."""

from t5vae.model.configuration import T5VAEConfig
from t5vae.model.modeling import T5VAE, Regularisers, T5VAEOutput
from t5vae.model.noise import row_keys

__all__ = ["T5VAE", "Regularisers", "T5VAEConfig", "T5VAEOutput", "row_keys"]
