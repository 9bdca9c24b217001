"""What one does with a trained model: see LatentSpace."""

from t5vae.latent.checkers import checker
from t5vae.latent.measures import measure
from t5vae.latent.space import LatentSpace, Samples

__all__ = ["LatentSpace", "Samples", "checker", "measure"]
