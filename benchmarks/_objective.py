"""What the benchmarks take of the inside of `t5vae.objective`.

Shapes: B codes of this rank, N codes of all, D latent size.
"""

from datetime import timedelta

import _report  # noqa: F401 (makes `shards` the package)
import torch.distributed as dist
from torch import Tensor

from t5vae.config import Config
from t5vae.objective import Gathering, mmd_of, start_gather


def gather(z_BD: Tensor) -> Gathering:
    """Of the codes of all ranks, under way."""
    return start_gather(z_BD)


def statistic(gathering: Gathering, config: Config) -> Tensor:
    """MMD^2 of what was gathered."""
    return mmd_of(gathering, **config.objective.mmd.options)


class Over(dist.Work):
    def wait(self, timeout: timedelta = timedelta()) -> bool:
        return True


def statistic_of_rank(z_BD: Tensor, gathered_ND: Tensor, kernel: str) -> Tensor:
    """What the first of several ranks does, in a group of its own: a gather that is over."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return mmd_of(Gathering(z_BD, None, None, None, gathered_ND, Over()), kernel=kernel)


def exact_statistic(z_ND: Tensor, kernel: str, prior: str) -> Tensor:
    """In fp64, as the formula says it."""
    from tests.objective import reference

    return reference.terms(z_ND, kernel, prior).value
