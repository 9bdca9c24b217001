"""The Triton kernels against the formulas in fp64, and what they compile to.

Without a GPU the kernels run under Triton's interpreter, which has to be chosen before they are
imported: all cases in one process of its own, which is this file run as a script.
"""

import json
import os
import subprocess
import sys
from functools import cache
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from t5vae.objective.kernels import InverseMultiquadric, Kernel, make_kernel

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
fused = pytest.importorskip("t5vae.objective.fused")
kernels = pytest.importorskip("t5vae.objective.fused_kernels")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
KERNELS = ["rbf", "multi_rbf", "imq", "legacy"]
DIMENSIONS = [1, 7, 64, 128, 1000]
SIZES = [(2, 2), (5, 200), (70, 33)]
CODES = ["collapsed", "equal", "huge", "zero", "clusters"]


class Case(NamedTuple):
    kernel: str
    dimensions: int
    size: tuple[int, int] = (70, 70)
    codes: str = "normal"
    precision: str = "fp32"

    def __str__(self) -> str:
        rows, columns = self.size
        return f"{self.kernel}-{self.dimensions}-{rows}x{columns}-{self.codes}-{self.precision}"


FP32 = [
    *(Case(kernel, *rest) for kernel, *rest in product(KERNELS, DIMENSIONS, SIZES)),
    *(Case(kernel, d, (256, 256)) for kernel, d in product(KERNELS, [64, 1000])),
    # those of huge codes are `mmd`'s to sum in fp64: tests/objective/test_table.py
    *(Case(k, d, codes=c) for k, d, c in product(KERNELS, [7, 300], CODES) if c != "huge"),
]
FP16 = [
    *(Case(k, d, s, precision="fp16") for k, d, s in product(KERNELS[:3], DIMENSIONS, SIZES[1:])),
    *(Case(k, 64, (70, 70), codes, "fp16") for k, codes in product(KERNELS[:3], CODES)),
]
BF16_INPUT = [
    Case(k, d, codes="bf16", precision="fp16") for k, d in product(KERNELS[:3], [64, 300])
]


TILED = [Case("imq", 64, (70, 300), precision="fp16"), Case("legacy", 64, (70, 70))]


class Errors(NamedTuple):
    """Of the total, over b N; of the pull, over what it is, or a thousandth of it at N(0, I)."""

    total: float
    pull: float


def formula(x_BD: Tensor, y_ND: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    x_BD, y_ND = x_BD.double(), y_ND.double()
    s_BN = (x_BD[:, None] - y_ND).square().sum(-1)
    if isinstance(kernel, InverseMultiquadric):
        count = len(kernel.scales)
        less_BN = sum(-s_BN / (c + s_BN) for c in kernel.scales) / count
        slope_BN = sum(c / (c + s_BN).square() for c in kernel.scales) / count
    else:
        gammas = [kernel.gamma * 2**m for m in range(kernel.octaves)]
        less_BN = sum(torch.expm1(-gamma * s_BN) for gamma in gammas) / len(gammas)
        slope_BN = sum(gamma * torch.exp(-gamma * s_BN) for gamma in gammas) / len(gammas)
    return less_BN.sum(), slope_BN @ y_ND - slope_BN.sum(1, keepdim=True) * x_BD


def draw(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows, columns = case.size
    x_BD = torch.randn(rows, case.dimensions, generator=generator)
    y_ND = x_BD if rows == columns else torch.randn(columns, case.dimensions, generator=generator)
    if case.codes == "collapsed":
        x_BD = y_ND = 1e-4 * x_BD
    elif case.codes == "equal":
        x_BD = y_ND = x_BD[:1].expand_as(x_BD).contiguous()
    elif case.codes == "huge":
        x_BD = y_ND = 300 * x_BD
    elif case.codes == "zero":
        x_BD = y_ND = torch.zeros_like(x_BD)
    elif case.codes == "clusters":
        x_BD = y_ND = x_BD[:2].repeat(rows // 2, 1) + 0.01 * x_BD
    return x_BD - y_ND.mean(0), y_ND - y_ND.mean(0)


def measure(case: Case, device: str) -> Errors:
    kernel = make_kernel(case.kernel, case.dimensions)
    x_BD, y_ND = draw(case)
    right_total, right_BD = formula(x_BD, y_ND, kernel)
    usual = formula(*draw(case._replace(codes="normal")), kernel)[1].norm()
    if case.codes == "bf16":
        x_BD = y_ND = x_BD.bfloat16().float()
    x_BD, y_ND = x_BD.to(device), y_ND.to(device)
    if torch.equal(x_BD, y_ND):
        y_ND = x_BD
    total, pull_BD = fused.pair_sum(x_BD, y_ND, kernel, case.precision)
    assert total.dtype == torch.float64
    assert pull_BD.dtype == torch.float32
    pairs = case.size[0] * case.size[1]
    error_BD = pull_BD.cpu() - right_BD
    floor = max(float(right_BD.norm()), 1e-3 * float(usual))
    return Errors(abs(float(total) - float(right_total)) / pairs, float(error_BD.norm()) / floor)


def measure_tiles() -> dict[str, list[list[float]]]:
    """Of some problems, the errors of each tile, and a digest of its pull, when it is in use."""
    found = {}
    for case in TILED:
        kernel = make_kernel(case.kernel, case.dimensions)
        tiling = fused.Tiling(kernel, case.dimensions)
        found[str(case)] = []
        for tile in [*tiling.tiles, *tiling.tiles]:
            tiling.use(tile)
            pull_BD = fused.pair_sum(*draw(case), kernel)[1]
            digest = pull_BD.view(torch.int32).sum(dtype=torch.int64).item()
            found[str(case)].append([*measure(case, "cpu"), digest])
    return found


@triton.jit
def exp2m1_kernel(v_ptr, out_ptr, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    v = tl.load(v_ptr + index)
    tl.store(out_ptr + index, kernels.exp2m1(v, tl.exp2(v)))


def exp2m1_error() -> float:
    """The largest relative error."""
    v = -torch.logspace(-30, 2, 4096, dtype=torch.float64).float()
    out = torch.empty_like(v)
    exp2m1_kernel[(1,)](v, out, len(v))
    right = torch.expm1(v.double() * torch.log(torch.tensor(2.0).double()))
    return float(((out - right) / right).abs().max())


def is_large(case: Case) -> bool:
    """Whether the interpreter takes seconds for it."""
    return case.dimensions >= 300 or max(case.size) >= 200


def each(cases: list[Case]) -> list[Any]:
    """Parameters of a test; large ones are left to the soak."""
    return [
        pytest.param(c, marks=pytest.mark.soak if is_large(c) else (), id=str(c)) for c in cases
    ]


@cache
def interpreted(large: bool = False) -> dict[str, list[float]]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *(["large"] if large else [])]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", each(FP32))
def test_fp32_factors_match_the_formula(case):
    errors = Errors(*interpreted(is_large(case))[str(case)])
    flat = case.kernel == "legacy" and case.dimensions == 1000
    assert errors.total <= 1e-6
    assert errors.pull <= (1e-4 if flat else 1e-5)


@pytest.mark.parametrize("case", each(FP16))
def test_fp16_factors_lose_no_more_than_their_rounding(case):
    errors = Errors(*interpreted(is_large(case))[str(case)])
    assert errors.total <= 1e-4
    assert errors.pull <= (1e-2 if case.codes == "huge" else 2e-3)


@pytest.mark.parametrize("case", each(BF16_INPUT))
def test_codes_that_were_bf16_match_the_formula_of_the_codes_before(case):
    assert Errors(*interpreted(is_large(case))[str(case)]).pull <= 1e-2


@pytest.mark.parametrize("case", TILED, ids=str)
def test_every_tile_is_right_and_repeats_itself(case):
    *errors, digests = zip(*interpreted()[str(("tiles", str(case)))], strict=True)
    assert max(errors[0]) <= 1e-4
    assert max(errors[1]) <= 2e-3
    half = len(digests) // 2
    assert digests[:half] == digests[half:]
    assert len(set(digests)) > 1, "the order of sums is the same for all"


def test_exp2m1_keeps_its_digits():
    assert interpreted()["exp2m1"][0] <= 3e-7


def test_only_flat_kernels_need_fp32_factors():
    for name, dimensions in product(KERNELS[:3], DIMENSIONS):
        assert fused.default_precision(make_kernel(name, dimensions), dimensions) == "fp16"
    assert fused.default_precision(make_kernel("legacy", 1000), 1000) == "fp32"


@pytest.mark.soak
def test_every_tile_compiles_for_an_h100_without_spilling():
    command = [sys.executable, "benchmarks/fused.py", "--kernels", "multi_rbf,imq"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--dimensions", "64,128,256"],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    head, *lines = done.stdout.partition("\n\n")[0].splitlines()
    assert head.endswith("registers spilled shared KiB")
    assert len(lines) >= 2 * 3 * 3
    for line in lines:
        registers, spilled, shared = map(float, line.split()[-3:])
        assert registers <= 255, line
        assert spilled == 0, line
        assert shared <= 227, line


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", FP32 + FP16, ids=str)
def test_a_gpu_gives_what_the_interpreter_gives(case):
    errors = measure(case, "cuda")
    fp32 = case.precision == "fp32"
    assert errors.total <= (1e-6 if fp32 else 1e-4)
    assert errors.pull <= (1e-4 if case.kernel == "legacy" else 1e-5 if fp32 else 1e-2)


if __name__ == "__main__":
    fused.CHUNK = 2**15  # several chunks of rows
    wanted = [c for c in chain(FP32, FP16, BF16_INPUT) if is_large(c) == ("large" in sys.argv)]
    measured = {str(case): measure(case, "cpu") for case in wanted}
    tiled = {} if "large" in sys.argv else measure_tiles()
    measured |= {str(("tiles", case)): rows for case, rows in tiled.items()}
    print(json.dumps(measured | {"exp2m1": [exp2m1_error()]}))
