"""The MMD of one rank among many: its row block's time over its matrix products', and its memory.

    python benchmarks/_scale_mmd.py

The codes of all ranks are there, as after the gather; the rank computes its rows' share of the
statistic, and their gradient. The products are [n, D] by [D, N] and [n, N] by [N, D], in as many
threads, timed before and after it in every turn. What does not fall with n is what every rank does
with the codes of all: it centres them, and has their norms beside them.

Shapes: N codes of all ranks, n = N / W of this one of W, D latent size.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from _report import ratios, say

N, D = 65_536, 1024
WORLDS = (1024, 256, 64)
TURNS = 3
THREADS = 1
KERNEL = "imq"


def measure(N: int, D: int, world: int, turns: int) -> None:
    """Print a rank's seconds, its products', and its memory, as JSON."""
    import torch
    from _mmd_peers import Peak, Timed, limits, ours_block, with_gradient
    from _timing import CPU

    torch.set_num_threads(THREADS)
    gathered_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    z_nD = gathered_ND[: N // world].clone().requires_grad_()
    loss = partial(ours_block, kernel=KERNEL)
    with_gradient(loss, z_nD[:2].detach().requires_grad_(), gathered_ND[:4])  # loads what it needs
    rank, limit = Timed(lambda: with_gradient(loss, z_nD, gathered_ND)), None
    peak = Peak(CPU)
    rank.seconds()
    told: dict[str, Any] = {"bytes": peak.extra(), "seconds": [], "limits": []}
    if turns:
        limit = Timed(limits(z_nD.detach(), gathered_ND)["fp32"])
        limit.seconds()
        for _ in range(turns):
            before, taken, after = limit.seconds(), rank.seconds(), limit.seconds()
            told["seconds"].append(taken)
            told["limits"].append((before + after) / 2)
    print(json.dumps(told))


def in_a_process(N: int, D: int, world: int, turns: int, **settings: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *map(str, (N, D, world, turns))]
    threads = {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(Path(__file__).parents[1])}
    output = subprocess.run(
        command, env=os.environ | threads | settings, stdout=subprocess.PIPE, check=True
    ).stdout
    return json.loads(output)


def rows(N: int = N, D: int = D, worlds: tuple[int, ...] = WORLDS) -> list[dict[str, Any]]:
    """Of each number of ranks: medians of the turns, and MiB above the codes of all."""
    found = []
    for world in worlds:
        say(f"MMD of a rank of {world:,}, N = {N:,}, D = {D:,}")
        timed = in_a_process(N, D, world, TURNS)
        # In a process that gives back all but small blocks as soon as they are free.
        peak = in_a_process(N, D, world, 0, MALLOC_MMAP_THRESHOLD_="65536")
        over = ratios(timed["seconds"], timed["limits"])
        found.append(
            {
                "ranks": world,
                "rows": N // world,
                "seconds": median(timed["seconds"]),
                "products": median(timed["limits"]),
                "ratio": median(over),
                "least": min(over),
                "most": max(over),
                "MiB": peak["bytes"] / 2**20,
                "codes_MiB": 4 * N * D / 2**20,
            }
        )
    return found


if __name__ == "__main__":
    if sys.argv[1:]:
        measure(*map(int, sys.argv[1:]))
    else:
        for world in WORLDS:
            print(json.dumps(rows(worlds=(world,))), flush=True)
