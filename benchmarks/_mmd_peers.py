"""The contenders of `mmd.py`, and what times one of them in a process of its own.

Shapes: N codes z and draws p of the prior, D latent size, b rows of one rank of `RANKS`.
"""

import ctypes
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import _report  # noqa: F401 (makes `shards` the package)
import torch
from _timing import CPU, status_bytes
from _timing import seconds as clock
from torch import Tensor

RANKS = 8
BLOCK = 0.04
"""Seconds that a fast call is repeated for, so that the clock's own noise is small."""
CHECKED_ROWS = 256
COMPILED_ROWS = 4096

Loss = Callable[[Tensor, Tensor], Tensor]
"""The statistic of codes, with gradient to them; see `inputs` for the second argument."""


# Ours; the prior's expectations are in closed form unless told otherwise.


def ours(z_ND: Tensor, p_ND: Tensor, kernel: str, **options: Any) -> Tensor:
    from t5vae.objective import mmd

    return mmd(z_ND, kernel=kernel, **options)


def ours_block(z_BD: Tensor, gathered_ND: Tensor, kernel: str) -> Tensor:
    from _objective import statistic_of_rank

    return statistic_of_rank(z_BD, gathered_ND, kernel)


def ours_exact(z_ND: Tensor, p_ND: Tensor, kernel: str, prior: str = "normal") -> Tensor:
    from _objective import exact_statistic

    return exact_statistic(z_ND, kernel, prior)


def block_exact(z_BD: Tensor, gathered_ND: Tensor, kernel: str) -> Tensor:
    return ours_exact(torch.cat([z_BD, gathered_ND[len(z_BD) :]]), gathered_ND, kernel)


# The peers: means of three blocks of a kernel, the prior's expectations by as many draws.


def three_blocks(z_ND: Tensor, p_ND: Tensor, matrix: Callable[[Tensor, Tensor], Any]) -> Tensor:
    def mean(x_ND: Tensor, y_ND: Tensor) -> Tensor:
        return matrix(x_ND, y_ND).sum(1).sum() / (len(x_ND) * len(y_ND))

    return mean(z_ND, z_ND) + mean(p_ND, p_ND) - 2 * mean(z_ND, p_ND)


def tiled(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    """As the original T5-VAE computes its kernel, "legacy" here."""
    size = len(x_ND), len(y_ND), x_ND.shape[1]
    x_NND = x_ND.unsqueeze(1).expand(size)
    y_NND = y_ND.unsqueeze(0).expand(size)
    return torch.exp(-(x_NND - y_NND).pow(2).mean(2) / size[2])


def octaves(s: Any, D: int) -> Any:
    """The kernel "multi_rbf" of squared distances: one exponential, the others its squares."""
    e = (s * (-1 / (8 * D))).exp()
    total = e
    for _ in range(4):
        e = e * e
        total = total + e
    return total / 5


def by_cdist(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    return octaves(torch.cdist(x_ND, y_ND).square(), x_ND.shape[1])


def by_gemm(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    s_NN = x_ND.square().sum(1, keepdim=True) + y_ND.square().sum(1) - 2 * x_ND @ y_ND.T
    return octaves(s_NN, x_ND.shape[1])


def by_keops(x_ND: Tensor, y_ND: Tensor) -> Any:
    import pykeops
    from pykeops.torch import LazyTensor

    pykeops.set_verbose(False)
    s_NN = ((LazyTensor(x_ND[:, None]) - LazyTensor(y_ND[None])) ** 2).sum(2)
    gammas = torch.tensor([2.0**k / (8 * x_ND.shape[1]) for k in range(5)])
    return (-s_NN * LazyTensor(gammas)).exp().sum(2) / 5


def geomloss(z_ND: Tensor, p_ND: Tensor, backend: str) -> Tensor:
    """Half the statistic of one Gaussian, "rbf" here."""
    from geomloss import SamplesLoss

    blur = math.sqrt(z_ND.shape[1])
    return 2 * SamplesLoss("gaussian", blur=blur, backend=backend)(z_ND, p_ND)


def rbf(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    return torch.exp(-torch.cdist(x_ND, y_ND).square() / (2 * x_ND.shape[1]))


def legacy(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    return torch.exp(-torch.cdist(x_ND, y_ND).square() / x_ND.shape[1] ** 2)


class Contender(NamedTuple):
    title: str
    loss: Loss
    exact: Loss
    """The same statistic in fp64."""
    compiled: bool = False
    packages: tuple[str, ...] = ()
    tiles: int = 0
    """How many times N^2 D floats it needs, where that is more than N^2."""
    ranks: int = 1
    """The rows of one of so many ranks are what it takes, and the limit's too."""


def own(title: str, kernel: str, prior: str = "normal", **options: Any) -> Contender:
    loss = partial(ours, kernel=kernel, prior=prior, **options)
    return Contender(title, loss, partial(ours_exact, kernel=kernel, prior=prior))


def block(title: str, kernel: str) -> Contender:
    loss, exact = partial(ours_block, kernel=kernel), partial(block_exact, kernel=kernel)
    return Contender(title, loss, exact, ranks=RANKS)


def peer(title: str, matrix: Callable[..., Any], *packages: str, **options: Any) -> Contender:
    exact = partial(three_blocks, matrix=legacy if matrix is tiled else by_gemm)
    blocks = partial(three_blocks, matrix=matrix)
    return Contender(title, blocks, exact, packages=packages, **options)


def gaussian(title: str, backend: str, *packages: str) -> Contender:
    exact = partial(three_blocks, matrix=rbf)
    return Contender(title, partial(geomloss, backend=backend), exact, packages=packages)


CONTENDERS = {
    "multi_rbf": own("`mmd`, multi_rbf", "multi_rbf"),
    "imq": own("`mmd`, imq", "imq"),
    "rbf": own("`mmd`, rbf", "rbf"),
    "sampled": own("`mmd`, multi_rbf, the prior sampled", "multi_rbf", prior="sampled"),
    "block": block(f"`mmd`, multi_rbf, a rank of {RANKS}", "multi_rbf"),
    "block_imq": block(f"`mmd`, imq, a rank of {RANKS}", "imq"),
    "triton": own("`mmd`, multi_rbf, Triton", "multi_rbf", implementation="triton"),
    "triton_imq": own("`mmd`, imq, Triton", "imq", implementation="triton"),
    "original": peer("the original's formula", tiled, tiles=6),
    "original_compiled": peer("the original's formula, `torch.compile`", tiled, compiled=True),
    "cdist": peer("`torch.cdist`, multi_rbf", by_cdist),
    "cdist_compiled": peer("`torch.cdist`, multi_rbf, `torch.compile`", by_cdist, compiled=True),
    "gemm": peer("a product, multi_rbf", by_gemm),
    "gemm_compiled": peer("a product, multi_rbf, `torch.compile`", by_gemm, compiled=True),
    "geomloss": gaussian("geomloss, tensorized, rbf", "tensorized", "geomloss"),
    "geomloss_online": gaussian("geomloss, online, rbf", "online", "geomloss", "pykeops"),
    "keops": peer("KeOps, multi_rbf", by_keops, "pykeops"),
}


# One contender in this process


def with_gradient(loss: Loss, z_BD: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    z_BD.grad = None
    value = loss(z_BD, other)
    value.backward()
    assert z_BD.grad is not None
    return value.detach(), z_BD.grad


def inputs(contender: Contender, z_ND: Tensor, p_ND: Tensor) -> tuple[Tensor, Tensor]:
    """What its loss takes: codes and draws, or a rank's codes and everyone's."""
    if contender.ranks == 1:
        return z_ND, p_ND
    return z_ND[: len(z_ND) // contender.ranks], z_ND


def check(contender: Contender, loss: Loss, z_BD: Tensor, other: Tensor, threads: int) -> None:
    """That a contender computes what it is said to; also its first call, which may compile."""
    torch.set_num_threads(1)  # the exact one has many small steps, and is not timed
    z_64 = z_BD.double().requires_grad_()
    exact, exact_gradient = with_gradient(contender.exact, z_64, other.double())
    torch.set_num_threads(threads)
    value, gradient = with_gradient(loss, z_BD.clone().requires_grad_(), other)
    if contender.ranks == 1:  # one of several does not have the others' parts of the value
        assert abs(value - exact) < 1e-4, f"the value is {value:.6f}, should be {exact:.6f}"
    error = (gradient - exact_gradient).norm() / exact_gradient.norm()
    assert error < 1e-2, f"the gradient's relative error is {error:.1e}"


def limits(x_BD: Tensor, y_ND: Tensor) -> dict[str, Callable[[], None]]:
    """Two products of 4 b N D operations in all, into buffers that are there: the work of MMD."""

    def products(x_BD: Tensor, y_ND: Tensor, precision: str) -> Callable[[], None]:
        s_BN, out_BD = x_BD.new_empty(len(x_BD), len(y_ND)), torch.empty_like(x_BD)

        def call() -> None:
            torch.set_float32_matmul_precision(precision)
            torch.mm(x_BD, y_ND.T, out=s_BN)
            torch.mm(s_BN, y_ND, out=out_BD)
            torch.set_float32_matmul_precision("highest")

        return call

    exact = {"fp32": products(x_BD, y_ND, "highest")}
    if x_BD.device.type == "cpu":
        return exact
    return {
        **exact,
        "tf32": products(x_BD, y_ND, "high"),
        "bf16": products(x_BD.bfloat16(), y_ND.bfloat16(), "highest"),
    }


class Timed:
    """A call, repeated until `BLOCK` seconds have passed."""

    def __init__(self, call: Callable[[], Any], device: torch.device = CPU):
        self.call, self.device, self.repeats = call, device, 1

    def seconds(self) -> float:
        seconds = clock(self._repeat, device=self.device) / self.repeats
        self.repeats = math.ceil(BLOCK / seconds)
        return seconds

    def _repeat(self) -> None:
        for _ in range(self.repeats):
            self.call()


class Peak:
    """The most memory above what this process, or its device, has now."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed is not there to be used again
            Path("/proc/self/clear_refs").write_text("5")
            self.before = status_bytes("VmRSS")

    def extra(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() - self.before
        return status_bytes("VmHWM") - self.before


def prepared(contender: Contender, z_ND: Tensor, p_ND: Tensor, threads: int) -> Callable[[], Any]:
    """Its forward and backward pass, after a check of what it computes on some rows."""
    loss = contender.loss
    if contender.compiled:
        loss = torch.compile(loss, dynamic=False)
    rows = min(len(z_ND), COMPILED_ROWS if contender.compiled else CHECKED_ROWS)
    check(contender, loss, *inputs(contender, z_ND[:rows], p_ND[:rows]), threads)
    z_BD, other = inputs(contender, z_ND, p_ND)
    trained_BD = z_BD.clone().requires_grad_()
    if contender.compiled and rows < len(z_ND):
        with_gradient(loss, trained_BD, other)  # it is compiled for one size
    return lambda: with_gradient(loss, trained_BD, other)


def main(name: str, N: int, D: int, threads: int, seconds: float) -> None:
    """Print a line of JSON for each turn: the limit, the contender, and the limit again."""
    contender = CONTENDERS[name]
    # Large tensors come and go in training: from then on glibc keeps what is freed. Until then it
    # gives memory back after each call, and the next call pays for it.
    torch.ones(2**22)
    z_ND, p_ND = torch.randn(2, N, D, generator=torch.Generator().manual_seed(0))
    timed = Timed(prepared(contender, z_ND, p_ND, threads))
    limit = Timed(limits(z_ND[: N // contender.ranks], z_ND)["fp32"])
    limit.seconds()
    peak, end = Peak(CPU), time.perf_counter() + seconds
    for turn in count():
        if turn and time.perf_counter() > end:
            break
        before, taken, after = limit.seconds(), timed.seconds(), limit.seconds()
        told = {"seconds": taken, "limit": (before + after) / 2, "bytes": peak.extra()}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    name, N, D, threads, seconds = sys.argv[1:]
    main(name, int(N), int(D), int(threads), float(seconds))
