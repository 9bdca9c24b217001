"""The held-out loss during training, all ranks together."""

from typing import Any

import numpy as np
import torch

from shards import Dataset
from t5vae.training.distributed import Ranks, all_sum

ROWS = 256


@torch.no_grad()
def held_out(
    engine: Any, dataset: Dataset, sequences: int, ranks: Ranks, device: torch.device
) -> float:
    """Teacher-forced cross-entropy in nats per token on the first `sequences` of the split valid.

    Every rank makes the same number of forward passes, as ZeRO-3 needs.
    """
    chosen = dataset.first("valid", sequences)
    count = len(chosen)
    nll = tokens = 0.0
    engine.eval()
    step = ROWS * ranks.world_size
    for start in range(0, count, step):
        numbers = np.arange(start, start + step)[ranks.rank :: ranks.world_size]
        counted = torch.from_numpy(numbers < count)
        ids, lengths = dataset.read("valid", chosen[np.minimum(numbers, count - 1)])
        output = engine(torch.as_tensor(ids).to(device), mode="score")
        nll += output.nll.cpu()[counted].sum().item()
        tokens += torch.as_tensor(lengths)[counted].sum().item()
    engine.train()
    all_nll, all_tokens = all_sum(nll, tokens, device=device)
    return all_nll / all_tokens
