"""LatentSpace: what one does with a trained model.

Shapes: N texts, D latent size, S steps of a path.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shards.errors import UserError
from t5vae.latent.checkers import Checker, checker
from t5vae.latent.codec import Codec
from t5vae.latent.folders import load_model
from t5vae.latent.paths import path
from t5vae.latent.priors import PRIORS, Gaussian, Normal


@dataclass(frozen=True)
class Samples:
    """Strings decoded from a prior.

    Attributes:
        texts: the strings that were kept.
        drawn: how many were decoded to find them; their quotient is the validity.
    """

    texts: list[str]
    drawn: int


class LatentSpace(Codec):
    """A trained model's space: encode, decode, interpolate, sample.

    Codes are float32 tensors [N, D] on the CPU; work is done in batches on the model's device.
    """

    @classmethod
    def load(
        cls, run_or_export: str | Path, device: str | torch.device | None = None
    ) -> "LatentSpace":
        """Open the export of a run.

        Args:
            run_or_export: a run folder with an `export/`, or the exported folder itself.
            device: where to compute; by default the accelerator if there is one, else the CPU.

        Raises:
            UserError: if there is no such folder, or no whole export of a T5VAE in it.
        """
        return cls(*load_model(Path(run_or_export), device))

    def interpolate(self, a: str, b: str, steps: int = 11, method: str = "linear") -> list[str]:
        """The texts on the way from a to b.

        Args:
            steps: how many, both ends included: the reconstructions of a and b.
            method: "linear" or "slerp", see :func:`t5vae.latent.paths.path`.

        Raises:
            UserError: for an unknown method, fewer than two steps, or a text that is too long.
        """
        z_2D = self.encode([a, b])
        z_SD = path(z_2D[:1], z_2D[1:], steps, method)[0]
        return self.detokenize(self.decode_ids(z_SD))

    def sample(
        self,
        n: int,
        prior: str = "normal",
        check: str | Checker | None = None,
        seed: int = 0,
        fit: Sequence[str] | Tensor | None = None,
        temperature: float = 0.0,
    ) -> Samples:
        """Decode draws from a prior.

        Args:
            n: how many texts.
            prior: "normal" for N(0, I); "gaussian" for the mean and covariance of `fit`.
            check: keep only what this checker finds valid, see :func:`t5vae.latent.checker`.
            seed: of the draws; the same seed gives the same texts.
            fit: for "gaussian": texts, or their codes [N, D].
            temperature: of the decoder, as in `decode`.

        Raises:
            UserError: for an unknown prior or checker, "gaussian" without `fit`, or a check that
                100 * n draws (2,000 at least) do not satisfy n times.
        """
        source = self._prior(prior, fit)
        is_valid = checker(check) if check is not None else lambda text: True
        generator = torch.Generator().manual_seed(seed)
        limit = max(100 * n, 2000) if check is not None else n
        texts: list[str] = []
        drawn = 0
        while len(texts) < n and drawn < limit:
            missing = n - len(texts)
            count = missing if check is None else min(max(2 * missing, 64), limit - drawn)
            z_ND = source.draw(count, generator)
            ids = self.decode_ids(z_ND, temperature=temperature, seed=seed + drawn)
            for text in self.detokenize(ids):
                drawn += 1
                if is_valid(text):
                    texts.append(text)
                    if len(texts) == n:
                        break
        if len(texts) < n:
            raise UserError(
                f"only {len(texts)} of {drawn} samples pass the check {check!r}, {n} were asked "
                "for; ask for fewer, leave the check out, or train longer"
            )
        return Samples(texts, drawn)

    def _prior(self, prior: str, fit: Sequence[str] | Tensor | None) -> Normal | Gaussian:
        if prior not in PRIORS:
            raise UserError(f"unknown prior {prior!r}; choose one of {', '.join(PRIORS)}")
        if prior == "normal":
            return Normal(self.latent_size)
        if fit is None:
            raise UserError("the prior 'gaussian' is fitted on texts; give some (fit=)")
        return Gaussian(fit if isinstance(fit, Tensor) else self.encode(fit))
