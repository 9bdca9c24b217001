"""A normalising flow fitted on codes.

Shapes: N rows, D latent size, B rows of a training batch.
"""

import copy
import math
from typing import Any, Self

import torch
from torch import Generator, Tensor, nn

from t5vae.common.progress import stage
from t5vae.latent.priors.gaussian import Gaussian
from t5vae.latent.priors.prior import Prior


class Flow(Prior):
    """A normalising flow: a normal distribution bent by coupling layers (zuko).

    Affine coupling (Dinh et al., arXiv 1605.08803) in the coordinates that a Gaussian whitens. A
    little noise on the codes while it learns keeps it from finding thin sheets in few of them; it
    learns until a tenth of the codes, which it does not see, gets no likelier.
    """

    fewest = 20

    LAYERS = 6
    HIDDEN = (256, 256)
    NOISE = 0.1
    STEPS, BATCH, RATE = 4000, 256, 1e-3
    CHECK_EVERY, PATIENCE = 100, 5

    def __init__(self, frame: Gaussian, layers: nn.Module):
        self.frame, self.layers = frame, layers.requires_grad_(False)

    @classmethod
    def fit(cls, codes_ND: Tensor, seed: int = 0) -> Self:
        frame = Gaussian.fit(codes_ND)
        generator = Generator().manual_seed(seed)
        white_ND = frame.whiten(codes_ND).float()
        white_ND = white_ND[torch.randperm(len(white_ND), generator=generator)]

        def noisy(rows_BD: Tensor) -> Tensor:
            return rows_BD + cls.NOISE * torch.randn(rows_BD.shape, generator=generator)

        count = len(white_ND) // 10
        unseen_ND, seen_ND = noisy(white_ND[:count]), white_ND[count:]
        layers = cls._layers(white_ND.shape[1], seed)
        optimizer = torch.optim.AdamW(layers.parameters(), lr=cls.RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cls.STEPS)
        best, best_state, best_step = math.inf, copy.deepcopy(layers.state_dict()), 0
        with stage("fitted the flow", cls.STEPS) as advance:
            for step in range(1, cls.STEPS + 1):
                rows_B = torch.randint(len(seen_ND), (cls.BATCH,), generator=generator)
                loss = -layers().log_prob(noisy(seen_ND[rows_B])).mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(layers.parameters(), 5.0)
                optimizer.step()
                schedule.step()
                if step % cls.CHECK_EVERY:
                    continue
                advance(cls.CHECK_EVERY)
                with torch.no_grad():
                    found = -layers().log_prob(unseen_ND).mean().item()
                if found < best:
                    best, best_state, best_step = found, copy.deepcopy(layers.state_dict()), step
                elif step - best_step >= cls.PATIENCE * cls.CHECK_EVERY:
                    break
        layers.load_state_dict(best_state)
        return cls(frame, layers)

    @classmethod
    def _layers(cls, latent_size: int, seed: int = 0) -> nn.Module:
        from zuko.flows import MAF

        how: dict[str, Any] = {"passes": 2, "hidden_features": cls.HIDDEN, "randperm": True}
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return MAF(latent_size, transforms=cls.LAYERS, **how)

    def draw(self, n: int, generator: Generator) -> Tensor:
        noise_ND = torch.randn(n, len(self.frame.mean_D), generator=generator)
        return self.frame.colour(self.layers().transform.inv(noise_ND))

    def log_density(self, z_ND: Tensor) -> Tensor:
        log_N = self.layers().log_prob(self.frame.whiten(z_ND).float())
        return log_N.double() + self.frame.log_whitening

    def tensors(self) -> dict[str, Tensor]:
        states = {f"layers.{name}": tensor for name, tensor in self.layers.state_dict().items()}
        return self.frame.tensors() | states

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        frame = Gaussian.from_tensors(tensors)
        layers = cls._layers(len(frame.mean_D))
        prefix = "layers."
        layers.load_state_dict(
            {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
        )
        return cls(frame, layers)
