"""What the Triton kernels of `t5vae.objective.fused` compile to.

    python benchmarks/fused.py                     # needs no GPU
    python benchmarks/fused.py --dimensions 64,128 --kernels multi_rbf

Each tile that is tried is compiled for an H100 or H200 (sm_90), where a program may use 255
registers a thread and 227 KiB of shared memory. How fast they are: `gpu.py --only products`.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import _report  # noqa: F401 (makes `shards` the package)
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from t5vae.objective import fused, fused_kernels
from t5vae.objective.kernels import make_kernel

KERNELS = ("rbf", "multi_rbf", "imq", "legacy")
DIMENSIONS = (64, 128, 256, 1000)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Usage(NamedTuple):
    """Registers a thread, and bytes."""

    registers: int
    spilled: int
    shared: int


def usages(name: str, dimensions: int) -> Iterator[tuple[fused.Precision, fused.Tile, Usage]]:
    """What each tile takes that is tried for a kernel by its name."""
    kernel = make_kernel(name, dimensions)
    form, *_ = fused.form_of(kernel)
    precision = fused.default_precision(kernel, dimensions)
    exact = precision == "fp32"
    width, whole = fused.padded_width(dimensions, precision)
    constants = {"WIDTH": width, "EXACT": exact, **form._asdict()}
    program = fused_kernels.pair if whole else fused_kernels.slope
    for tile in fused.tiles_of(width, whole, exact):
        yield precision, tile, compiled(program, constants, tile)


def compiled(kernel, constants: dict, tile: fused.Tile) -> Usage:
    """A kernel of `fused` for sm_90."""
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
    return Usage(int(registers), int(stack) + int(local), program.metadata.shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--dimensions", default=",".join(map(str, DIMENSIONS)))
    options = parser.parse_args()
    print("kernel     D     factors rows columns warps stages registers spilled shared KiB")
    for name, size in product(options.kernels.split(","), options.dimensions.split(",")):
        for precision, tile, usage in usages(name, int(size)):
            shape = "{:4} {:7} {:5} {:6}".format(*tile)
            print(
                f"{name:10} {size:<5} {precision:7} {shape} {usage.registers:9} "
                f"{usage.spilled:7} {usage.shared / 1024:10.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
