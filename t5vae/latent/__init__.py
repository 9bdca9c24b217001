"""What one does with a trained model: encode, decode, interpolate, sample."""

from t5vae.latent.checkers import checker
from t5vae.latent.space import LatentSpace, Samples

__all__ = ["LatentSpace", "Samples", "checker"]
