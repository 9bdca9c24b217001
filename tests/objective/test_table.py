"""Every implementation of MMD against the formulas in fp64, over one table of cases.

A value may err by a share of the summed magnitude of its terms; a gradient by a share of its norm,
or, where it is smaller than that, of a thousandth of its norm for codes drawn from N(0, I).

Triton's interpreter has to be chosen before the kernels are imported: its cases run in a process
of its own, which is this file run as a script.
"""

import json
import os
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from t5vae.objective import mmd
from tests.objective import reference

KERNELS = ["rbf", "multi_rbf", "imq", "legacy"]
PRIORS = ["normal", "sampled", "uniform"]
DIMENSIONS = [1, 7, 64, 128, 1000]
CODES = ["zero", "equal", "collapsed", "huge", "far apart", "prior"]


class Case(NamedTuple):
    kernel: str
    dimensions: int
    count: int
    prior: str = "normal"
    estimator: str = "u"
    codes: str = "usual"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return "-".join(str(part).replace(" ", "_") for part in self)

    @property
    def options(self) -> dict[str, str]:
        return {"kernel": self.kernel, "prior": self.prior, "estimator": self.estimator}


def table(counts: list[int]) -> list[Case]:
    cases = [
        *(Case(*rest) for rest in product(KERNELS, DIMENSIONS, counts)),
        *(Case(k, 7, 70, p, e) for k, p, e in product(KERNELS, PRIORS, ["u", "v"])),
        *(Case(k, d, 70, codes=c) for k, d, c in product(KERNELS, [1, 64, 1000], CODES)),
        *(Case(k, 64, 70, dtype=torch.bfloat16) for k in KERNELS[:3]),
    ]
    cases += [
        Case(k, d, 200, p, e)
        for k, d, p, e in product(KERNELS, [64, 1000], PRIORS, ["u", "v"])
        if (k, p) != ("imq", "uniform")  # the formula takes minutes
    ]
    return list(dict.fromkeys(cases))


BLOCKED = table([2, 5, 300, 700])
LARGE = [
    Case("multi_rbf", 128, 4096),
    Case("imq", 1000, 2048),
    Case("legacy", 1000, 1100, "sampled", "v"),
]
TRITON = table([2, 33, 256])


def draw(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(case.count)
    z_ND = torch.randn(case.count, case.dimensions, generator=generator)
    scale_D = torch.linspace(0.5, 1.5, case.dimensions)
    made = {
        "usual": z_ND * scale_D + 0.3 * scale_D.flip(0),
        "prior": z_ND,
        "zero": 0 * z_ND,
        "equal": z_ND[:1].expand_as(z_ND),
        "collapsed": 1 + 1e-4 * z_ND,
        "huge": 1e3 * z_ND,
        "far apart": z_ND + 300 * (torch.arange(case.count)[:, None] % 2),
    }[case.codes]
    return made.to(case.dtype).float()


def exact(z_ND: Tensor, options: dict[str, str]) -> tuple[reference.Terms, Tensor]:
    z_ND = z_ND.double().requires_grad_()
    terms = reference.terms(z_ND, **options)
    (gradient_ND,) = torch.autograd.grad(terms.value, z_ND)
    return terms, gradient_ND


@cache
def usual_norm(kernel: str, prior: str, estimator: str, dimensions: int, count: int) -> float:
    case = Case(kernel, dimensions, count, codes="prior")
    options = {"kernel": kernel, "prior": prior, "estimator": estimator}
    return exact(draw(case), options)[1].norm().item()


class Errors(NamedTuple):
    value: float
    gradient: float


@cache
def right(case: Case) -> tuple[reference.Terms, Tensor]:
    return exact(draw(case), case.options)


def measure(case: Case, implementation: str, device: str = "cpu") -> Errors:
    z_ND = draw(case).to(device, case.dtype).requires_grad_()
    value = mmd(z_ND, **case.options, implementation=implementation)
    scale = 2.0**16 if case.dtype == torch.float16 else 1.0  # as losses are, in training
    (scaled_ND,) = torch.autograd.grad(scale * value, z_ND)
    gradient_ND = scaled_ND.cpu().float() / scale
    terms, right_ND = right(case)
    floor = usual_norm(case.kernel, case.prior, case.estimator, case.dimensions, case.count)
    return Errors(
        abs(value.item() - terms.value.item()) / terms.magnitude,
        ((gradient_ND - right_ND).norm() / max(right_ND.norm().item(), 1e-3 * floor)).item(),
    )


def bounds(case: Case) -> Errors:
    """The most that they may be."""
    flat = case.kernel == "legacy" and case.dimensions == 1000
    half = case.dtype != torch.float32
    return Errors(1e-5 if flat else 1e-6, 1e-2 if half else 1e-4 if flat else 1e-5)


def check(errors: Errors, case: Case) -> None:
    most = bounds(case)
    assert errors.value <= most.value
    assert errors.gradient <= most.gradient


@pytest.mark.parametrize("case", BLOCKED, ids=str)
def test_blocked(case):
    check(measure(case, "blocked"), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_blocked_on_large_batches(case):
    check(measure(case, "blocked"), case)


def is_large(case: Case) -> bool:
    """Whether the interpreter takes seconds for it."""
    return case.dimensions == 1000 or case.count > 70


INTERPRETED = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
INTERPRETED["PYTHONPATH"] = str(Path(__file__).parents[2])  # for the tests' own modules


@cache
def interpreted(large: bool) -> dict[str, list[float]]:
    done = subprocess.run(
        [sys.executable, __file__, *(["large"] if large else [])],
        env={**os.environ, **INTERPRETED},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.soak if is_large(c) else (), id=str(c)) for c in TRITON],
)
def test_triton_under_its_interpreter(case):
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    check(Errors(*interpreted(is_large(case))[str(case)]), case)


if __name__ == "__main__":
    from t5vae.objective import fused

    fused.default_precision = lambda *_: "fp32"
    cases = [case for case in TRITON if is_large(case) == ("large" in sys.argv)]
    print(json.dumps({str(case): measure(case, "triton") for case in cases}))
