"""Which numbers a run computes in: where its configuration leaves that open, the clock says.

What a processor's flags promise has been wrong: one with AVX-512 and no bf16 emulates its products.
So every rank times a few of the model's own, all at once, and the slowest rank's times decide.
"""

import math
import time
from collections.abc import Mapping
from typing import Any, Literal

import torch

from t5vae.cluster.agreement import all_max
from t5vae.common.kinds import OPTIMISERS, find
from t5vae.config import BatchSplit, Config
from t5vae.model import T5VAEConfig

Precision = Literal["fp32", "bf16"]
Product = tuple[int, int, int]

WORTH = 1.2  # times as fast as fp32, from which on bf16 is taken
SECONDS = 0.02  # of products in one precision
FEW = 8  # rows that tell whether all of them would take far too long
LIMITS = {"cpu": (512, 4e8)}  # the widest matrix, and the operations of one turn: milliseconds
ACCELERATED = (8192, 1e11)


def settle(
    config: Config,
    settings: T5VAEConfig,
    split: BatchSplit,
    device: torch.device,
    before: Mapping[str, Any],
) -> tuple[Config, list[str]]:
    """Set `train.precision` where it is null, and on a CPU the optimiser's.

    All ranks call it together, and find the same. A process without a group decides alone.

    Args:
        config: the run's.
        settings: the model's.
        split: how the global batch is dealt.
        device: this rank's.
        before: the layout of the checkpoint that the run goes on from, whose precisions it keeps.

    Returns:
        The configuration, and a line for each choice that was timed.
    """
    reasons: list[str] = []

    def chosen(name: str, products: list[Product], what: str = "") -> str:
        if before.get(name):
            return before[name]
        precision, reason = faster(products, device)
        reasons.append(what + reason)
        return precision

    if config.train.precision is None:
        tokens = settings.sequence_length * split.micro
        precision = chosen("precision", model_products(settings, tokens))
        config = config.with_("train", precision=precision)
    name = config.optim.name
    key = find(OPTIMISERS, name).precision_key
    if key and device.type == "cpu" and getattr(config.optim, key) is None:
        width = settings.t5_config.d_model
        precision = chosen(key, [(width, width, width)], f"{name} in ")
        config = config.with_("optim", **{key: precision})
    return config, reasons


def settled(config: Config, precision: Precision) -> Config:
    """The configuration with this precision if it has none."""
    return config if config.train.precision else config.with_("train", precision=precision)


def model_products(settings: T5VAEConfig, tokens: int) -> list[Product]:
    """Rows, columns and inner size of a model's products: of one layer, and the logits."""
    t5 = settings.t5_config
    heads = t5.num_heads * t5.d_kv
    sizes = [(heads, t5.d_model), (t5.d_ff, t5.d_model), (t5.d_model, t5.d_ff)]
    return [(tokens, n, k) for n, k in [*sizes, (t5.vocab_size, t5.d_model)]]


def faster(products: list[Product], device: torch.device) -> tuple[Precision, str]:
    """The precision in which the slowest rank multiplies faster, and why, in a line."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        all_max(0)  # so that all ranks multiply at once
        seconds.append(product_seconds(products, dtype, device))
    fp32, bf16 = all_max(*seconds)
    precision: Precision = "bf16" if fp32 >= WORTH * bf16 else "fp32"
    times = {"fp32": fp32, "bf16": bf16}
    other = "fp32" if precision == "bf16" else "bf16"
    return precision, (
        f"{precision}: its products take {_milliseconds(times[precision])}, those of {other} "
        f"{_milliseconds(times[other])}, on the slowest rank"
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def product_seconds(products: list[Product], dtype: torch.dtype, device: torch.device) -> float:
    """What linear layers of these shapes take, forward and backward, on this rank.

    On CUDA those in fp32 are in TF32, as an fp32 model's are.

    Where a few of their rows show that all would take far too long, as emulated products do, they
    are not tried: the time is that of the few, times their share.

    Args:
        products: rows, columns and inner size of each; made smaller where they are too large.
        dtype: of all matrices.
        device: to multiply on; of a CPU one core.
    """
    widest, operations = LIMITS.get(device.type, ACCELERATED)
    sizes = [(min(n, widest), min(k, widest)) for _, n, k in products]
    rows = min(products[0][0], int(operations / sum(6 * n * k for n, k in sizes)))
    few = min(rows, FEW)
    matmul, threads = torch.backends.cuda.matmul, torch.get_num_threads()
    fp32 = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    torch.set_num_threads(1)  # several wait for each other where a machine is busy
    try:
        _seconds(sizes, few, dtype, device, 0)  # the first products of a process take longer
        estimate = rows / few * _seconds(sizes, few, dtype, device, SECONDS / 5)
        if estimate > 5 * SECONDS:
            return estimate
        return _seconds(sizes, rows, dtype, device, SECONDS)
    finally:
        torch.set_num_threads(threads)
        matmul.fp32_precision = fp32


def _seconds(
    sizes: list[tuple[int, int]], rows: int, dtype: torch.dtype, device: torch.device, budget: float
) -> float:
    """The fastest of as many turns as there is time for.

    On a CPU it is one thread's own time that counts, which no other program lengthens.
    """
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    options = {"dtype": dtype, "device": device}
    layers = [
        (
            torch.ones(rows, k, **options),
            torch.ones(n, k, **options),
            torch.ones(rows, n, **options),
        )
        for n, k in sizes
    ]
    best, end = math.inf, clock() + budget
    while True:
        _synchronize(device)
        began = clock()
        for x, weight, gradient in layers:
            x @ weight.T
            gradient @ weight
            gradient.T @ x
        _synchronize(device)
        now = clock()
        best = min(best, now - began)
        if now >= end:
            return best


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
