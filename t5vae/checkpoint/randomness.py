"""What would make two runs differ: the generators that no key of ours replaces, the order of sums.

The generators are those of weights and dropout.
"""

import contextlib
import json
import os
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    """Seed python's, numpy's and torch's generators, with any integer."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**64)


def be_deterministic() -> None:
    """Let torch choose only algorithms that give the same bits every time, or raise RuntimeError.

    To be called before anything is multiplied: cuBLAS reads its variable once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing of it is read


def random_state() -> tuple[dict[str, Tensor], str]:
    """This process's generators: torch's as uint8 tensors, the others' as JSON."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    plain = {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }
    tensors = {"cpu": torch.get_rng_state()}
    if torch.accelerator.is_available():
        tensors["accelerator"] = torch.get_device_module().get_rng_state()
    return tensors, json.dumps(plain)


def set_random_state(tensors: dict[str, Tensor], plain: str) -> None:
    """Go on as the generators that `random_state` described."""
    states = json.loads(plain)
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(tensors["cpu"])
    if "accelerator" in tensors and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(tensors["accelerator"])


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever is drawn meanwhile, the generators then go on as if nothing had been."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(*state)
