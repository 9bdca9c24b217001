"""Which tiles the terms of the objective are computed by: the fastest, chosen once in a run.

Other tiles sum in another order, so a run that chose anew at a restart would not repeat itself.
"""

from collections.abc import Mapping
from typing import Any

import torch

from t5vae.cluster.agreement import all_max, from_first
from t5vae.config import BatchSplit, Objective


def settle_tiles(
    objective: Objective,
    latent_size: int,
    split: BatchSplit,
    device: torch.device,
    before: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """Choose the tiles of each term that has several, and use them in this process.

    All ranks call it together, and find the same: the slowest rank's times decide.

    Args:
        objective: whose terms.
        latent_size: D.
        split: how the global batch is dealt.
        device: this rank's.
        before: what this gave when the run began that is gone on with, which is kept on the same
            kind of device.

    Returns:
        Rank 0's "device", and the tiles by the term's name, fit for JSON; empty for no such term.
        And a line for each choice.
    """
    tilings = {
        name: tiling
        for name, term in objective.computed.items()
        if (tiling := term.tiling(latent_size))
    }
    if not tilings:
        return {}, []
    settled: dict[str, Any] = {"device": from_first(lambda: _kind(device))}
    reasons: list[str] = []
    kept = before if before.get("device") == settled["device"] else {}
    for name, tiling in tilings.items():
        tile = next((tile for tile in tiling.tiles if list(tile) == kept.get(name)), None)
        if tile is None:
            all_max(0)  # so that all ranks compute at once
            times = all_max(*tiling.milliseconds(split.micro, split.micro * split.ranks, device))
            fastest = min(times)
            tile = tiling.tiles[times.index(fastest)]
            reasons.append(
                f"{name} in tiles {list(tile)}: the fastest of {len(times)} on the slowest rank, "
                f"{fastest:.3g} ms"
            )
        tiling.use(tile)
        settled[name] = list(tile)
    return settled, reasons


def _kind(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
