"""What the Triton kernels of `t5vae.objective.fused` compile to, and how fast they are.

    python benchmarks/fused.py                     # needs no GPU for the first table
    python benchmarks/fused.py --dimensions 64,128 --kernels multi_rbf

Each tile that is tried is compiled for an H100 or H200 (sm_90), where a program may use 255
registers a thread and 227 KiB of shared memory. Where a CUDA device is at hand, `pair_sum` of N
codes with themselves is timed beside two matrix products of 4 N^2 D operations in all, by cuBLAS;
beside `blocked`, which does only half of the work; and beside torch.compile of the formula.

Shapes: N codes x, D latent size.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path[0] = str(Path(__file__).parents[1])  # `shards` is the package, not its benchmark

from t5vae.objective import blocked, fused  # noqa: E402
from t5vae.objective.kernels import Gaussians, Kernel, make_kernel  # noqa: E402

KERNELS = ("rbf", "multi_rbf", "imq", "legacy")
TIMED_KERNELS = ("multi_rbf", "imq")
DIMENSIONS = (64, 128, 256, 1000)
COUNTS = (4096, 32768)
TURNS = 15
BLOCK = 0.02
"""Seconds that a call is repeated for in a turn."""
SHARED = 227 * 1024
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Usage(NamedTuple):
    """A kernel compiled for sm_90: registers a thread, bytes."""

    kernel: str
    dimensions: int
    precision: str
    tile: fused.Tile
    registers: int
    spilled: int
    shared: int


def usages(name: str, dimensions: int, precision: fused.Precision) -> Iterator[Usage]:
    """What each tile takes that is tried for a kernel by its name."""
    form, *_ = fused.form_of(make_kernel(name, dimensions))
    exact = precision == "fp32"
    width, whole = fused.padded_width(dimensions, precision)
    constants = {"WIDTH": width, "EXACT": exact, **form._asdict()}
    kernel = fused._pair_kernel if whole else fused._slope_kernel
    for tile in fused.tiles_of(width, whole, exact):
        yield Usage(name, dimensions, precision, tile, *compiled(kernel, constants, tile))


def compiled(kernel, constants: dict, tile: fused.Tile) -> tuple[int, int, int]:
    """Registers, spilled bytes and shared bytes of a kernel of `fused`."""
    rows, columns, warps, stages = tile
    constants = constants | {"ROWS": rows, "COLUMNS": columns}
    factors = "fp32" if constants["EXACT"] else "fp16"
    types = {"x_ptr": factors, "y_ptr": factors, "slope_ptr": factors}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + types.get(name, "fp32")
        else:
            signature[name] = "fp32" if name == "twice" else "i32"
        if name not in constants and name not in ("twice", "columns"):
            attributes[index,] = [["tt.divisibility", 16]]
    program = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", listing).groups()
    return int(registers), int(stack) + int(local), program.metadata.shared


def print_usages(kernels: Iterable[str], dimensions: Iterable[int]) -> None:
    print("kernel     D     factors rows columns warps stages registers spilled shared KiB")
    for name, size in product(kernels, dimensions):
        wanted = fused.default_precision(make_kernel(name, size), size)
        for usage in usages(name, size, wanted):
            tile = "{:4} {:7} {:5} {:6}".format(*usage.tile)
            print(
                f"{name:10} {size:<5} {usage.precision:7} {tile} {usage.registers:9} "
                f"{usage.spilled:7} {usage.shared / 1024:10.1f}",
                flush=True,
            )


def formula(x_ND: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """`pair_sum` as one would write it, for torch.compile."""
    norm_N = x_ND.square().sum(1)
    s_NN = (norm_N[:, None] + norm_N - 2 * x_ND @ x_ND.T).clamp_min(0)
    if isinstance(kernel, Gaussians):
        gammas = kernel.mixture().gammas
        phi_NN = sum(torch.exp(-gamma * s_NN) for gamma in gammas) / len(gammas)
        slope_NN = sum(g * torch.exp(-g * s_NN) for g in gammas) / len(gammas)
    else:
        phi_NN = sum(c / (c + s_NN) for c in kernel.scales) / len(kernel.scales)
        slope_NN = sum(c / (c + s_NN).square() for c in kernel.scales) / len(kernel.scales)
    total = (phi_NN - 1).sum(dtype=torch.float64)
    return total, slope_NN @ x_ND - slope_NN.sum(1, keepdim=True) * x_ND


def products(x_ND: Tensor) -> Callable[[], object]:
    """Both products into buffers that are there already, in the dtype of the codes."""
    slope_NN = x_ND.new_empty(len(x_ND), len(x_ND))
    pull_ND = torch.empty_like(x_ND)

    def run() -> None:
        torch.mm(x_ND, x_ND.T, out=slope_NN)
        torch.mm(slope_NN, x_ND, out=pull_ND)

    return run


def seconds(run: Callable[[], object], repeats: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def times(runs: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each in `TURNS` turns, taken in alternation after compiling and warming up."""
    repeats = {}
    for name, run in runs.items():
        run()
        torch.cuda.synchronize()
        repeats[name] = max(1, int(BLOCK / seconds(run, 3)))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(TURNS):
        for name, run in runs.items():
            taken[name].append(seconds(run, repeats[name]))
    return taken


def print_times(kernels: Iterable[str], dimensions: Iterable[int]) -> None:
    """Medians of the turns; a ratio is the median of the ratios within turns."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, triton", end=" ")
    print(f"{triton.__version__}; fp16 factors, or fp32 where the kernel needs them; ratios")
    print(
        "kernel     D     N     tf32 products ms   triton/tf32  /bf16  /blocked  /compiled  error"
    )
    for name, size, count in product(kernels, dimensions, COUNTS):
        kernel = make_kernel(name, size)
        x_ND = torch.randn(count, size, device="cuda")
        x_ND -= x_ND.mean(0)
        in_torch = torch.compile(partial(formula, kernel=kernel), dynamic=False)
        taken = times(
            {
                "triton": partial(fused.pair_sum, x_ND, x_ND, kernel),
                "tf32": products(x_ND),
                "bf16": products(x_ND.bfloat16()),
                "blocked": partial(blocked.pair_sum, x_ND, x_ND, kernel),
                "compiled": partial(in_torch, x_ND),
            }
        )
        ratios = [
            median(t / o for t, o in zip(taken["triton"], taken[other], strict=True))
            for other in ("tf32", "bf16", "blocked", "compiled")
        ]
        x_64 = x_ND.double()
        _, right_ND = blocked.pair_sum(x_64, x_64, kernel)
        error_ND = fused.pair_sum(x_ND, x_ND, kernel)[1] - right_ND
        print(
            f"{name:10} {size:<5} {count:<5} {1e3 * median(taken['tf32']):16.3f} "
            "{:13.2f} {:6.2f} {:9.2f} {:10.2f}".format(*ratios),
            f" {error_ND.norm() / right_ND.norm():.1e}",
            flush=True,
        )
        torch._dynamo.reset()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--dimensions", default=",".join(map(str, DIMENSIONS)))
    options = parser.parse_args()
    kernels = options.kernels.split(",")
    dimensions = [int(number) for number in options.dimensions.split(",")]
    print_usages(kernels, dimensions)
    if torch.cuda.is_available():
        print_times([name for name in kernels if name in TIMED_KERNELS], dimensions)
    else:
        print("\nNo CUDA device: nothing was run, nothing is timed.")


if __name__ == "__main__":
    main()
