"""mmd() against the formulas of docs/objective.md, in fp64 with O(N^2) memory and autograd."""

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from t5vae.objective import mmd, start_gather
from t5vae.objective.mmd import _draws

KERNELS = ["rbf", "multi_rbf", "imq", "legacy"]
ESTIMATORS = ["u", "v"]
DIMENSIONS = [1, 7, 64]
COUNTS = [2, 5, 300, 700]


@lru_cache
def exponential_quadrature() -> tuple[Tensor, Tensor]:
    """Nodes and masses of an expectation over v ~ Exp(1): Gauss-Legendre on panels doubling from
    1e-12 to 40, 16 nodes each."""
    nodes, masses = map(torch.from_numpy, np.polynomial.legendre.leggauss(16))
    edges = torch.cat([torch.zeros(1).double(), 40 * 2.0 ** torch.arange(-45, 1).double()])
    low, high = edges[:-1, None], edges[1:, None]
    v = ((high + low) / 2 + (high - low) / 2 * nodes).flatten()
    return v, ((high - low) / 2 * masses).flatten() * torch.exp(-v)


@dataclass
class Formulas:
    """phi(s), h(|z|^2) and c, in closed form or by quadrature."""

    kernel: str
    dimensions: int
    sigma: float = 1.0

    def gammas(self) -> list[float]:
        usual = 1 / (2 * self.dimensions * self.sigma**2)
        return {
            "rbf": [usual],
            "multi_rbf": [usual * octave for octave in (0.25, 0.5, 1, 2, 4)],
            "legacy": [1 / self.dimensions**2],
        }[self.kernel]

    def scales(self) -> list[float]:
        usual = 2 * self.dimensions * self.sigma**2
        return [usual * scale for scale in (0.1, 0.2, 0.5, 1, 2, 5, 10)]

    def phi(self, s: Tensor) -> Tensor:
        if self.kernel == "imq":
            return sum(scale / (scale + s) for scale in self.scales()) / 7
        return sum(torch.exp(-gamma * s) for gamma in self.gammas()) / len(self.gammas())

    def rbf_h(self, gamma, r: Tensor) -> Tensor:
        spread = 1 + 2 * gamma * self.sigma**2
        return spread ** (-self.dimensions / 2) * torch.exp(-gamma * r / spread)

    def h(self, r: Tensor) -> Tensor:
        if self.kernel != "imq":
            return sum(self.rbf_h(gamma, r) for gamma in self.gammas()) / len(self.gammas())
        v, mass = exponential_quadrature()
        return sum((self.rbf_h(v / c, r[..., None]) * mass).sum(-1) for c in self.scales()) / 7

    def c(self) -> Tensor:
        power = -self.dimensions / 2
        if self.kernel != "imq":
            gammas = torch.tensor(self.gammas(), dtype=torch.float64)
            return ((1 + 4 * gammas * self.sigma**2) ** power).mean()
        v, mass = exponential_quadrature()
        scaled = [(1 + 4 * v / scale * self.sigma**2) ** power for scale in self.scales()]
        return sum((expectation * mass).sum() for expectation in scaled) / 7


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    s = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return s.clamp_min(0)


def within(formulas: Formulas, x: Tensor, estimator: str) -> Tensor:
    count = len(x)
    phi = formulas.phi(squared_distances(x, x))
    if estimator == "v":
        return phi.sum() / count**2
    return phi[~torch.eye(count, dtype=torch.bool)].sum() / (count * (count - 1))


def reference(z_ND, formulas, estimator, draws=None) -> tuple[Tensor, Tensor, float]:
    """The statistic, its gradient, and the summed magnitude of its terms."""
    z_ND = z_ND.detach().double().requires_grad_()
    zz = within(formulas, z_ND, estimator)
    if draws is None:
        zp, pp = formulas.h(z_ND.square().sum(1)).mean(), formulas.c()
    else:
        draws = draws.double()
        zp = formulas.phi(squared_distances(z_ND, draws)).mean()
        pp = within(formulas, draws, estimator)
    value = zz - 2 * zp + pp
    (gradient,) = torch.autograd.grad(value, z_ND)
    return value.detach(), gradient, (zz + 2 * zp + pp).item()


def computed(z_ND, **options) -> tuple[Tensor, Tensor]:
    z_ND = z_ND.clone().requires_grad_()
    value = mmd(z_ND, **options)
    (gradient,) = torch.autograd.grad(value, z_ND)
    return value.detach(), gradient


def codes(count: int, dimensions: int, seed: int = 0) -> Tensor:
    """Codes that are not yet the prior's: another scale and mean in each coordinate."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 1.5, dimensions)
    z_ND = torch.randn(count, dimensions, generator=generator)
    return z_ND * scale + 0.3 * scale.flip(0)


def assert_agrees(actual, expected, loss=1e-6, gradient=1e-5):
    value, gradient_ND = actual
    expected_value, expected_ND, magnitude = expected
    assert value.dtype == torch.float32
    assert abs(value.item() - expected_value.item()) <= loss * magnitude
    assert (gradient_ND - expected_ND).norm() <= gradient * expected_ND.norm()


CASES = list(itertools.product(KERNELS, ESTIMATORS, DIMENSIONS, COUNTS))


@pytest.mark.parametrize(("kernel", "estimator", "dimensions", "count"), CASES)
def test_value_and_gradient_are_the_references(kernel, estimator, dimensions, count):
    z_ND = codes(count, dimensions)
    expected = reference(z_ND, Formulas(kernel, dimensions), estimator)
    assert_agrees(computed(z_ND, kernel=kernel, estimator=estimator), expected)


@pytest.mark.parametrize("sigma", [0.5, 3.0])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_priors_scale_enters_as_in_the_reference(kernel, sigma):
    z_ND = sigma * codes(40, 7)
    expected = reference(z_ND, Formulas(kernel, 7, sigma), "u")
    assert_agrees(computed(z_ND, kernel=kernel, sigma=sigma), expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dimensions", "count"), [(1, 5), (7, 2), (64, 600)])
def test_sampled_prior_is_the_formula_on_the_same_draws(kernel, estimator, dimensions, count):
    z_ND = codes(count, dimensions)
    draws = _draws(count, dimensions, 1.5, 11, z_ND.device)
    expected = reference(z_ND, Formulas(kernel, dimensions, 1.5), estimator, draws)
    options = {"prior": "sampled", "sigma": 1.5, "generator_seed": 11}
    assert_agrees(computed(z_ND, kernel=kernel, estimator=estimator, **options), expected)


def test_draws_of_the_prior_repeat_with_their_seed_and_have_its_scale():
    draws = _draws(4000, 5, 2.0, 3, torch.device("cpu"))
    assert torch.equal(draws, _draws(4000, 5, 2.0, 3, torch.device("cpu")))
    assert not torch.equal(draws, _draws(4000, 5, 2.0, 4, torch.device("cpu")))
    assert draws.mean().item() == pytest.approx(0, abs=5 * 2 / 20000**0.5)
    assert draws.std().item() == pytest.approx(2, abs=5 * 2 / 40000**0.5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dimensions", [1, 7])
def test_the_references_closed_forms_are_expectations_under_the_prior(kernel, dimensions):
    generator = torch.Generator().manual_seed(0)
    formulas = Formulas(kernel, dimensions, 1.3)
    shape = (2, 200_000, dimensions)
    p, q = 1.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    z = torch.full((dimensions,), 0.8, dtype=torch.float64)
    for phi, closed in (
        (formulas.phi((p - z).square().sum(1)), formulas.h(z.square().sum())),
        (formulas.phi((p - q).square().sum(1)), formulas.c()),
    ):
        five_errors = 5 * phi.std().item() / len(phi) ** 0.5
        assert phi.mean().item() == pytest.approx(closed.item(), abs=five_errors)


def test_the_references_quadrature_integrates_the_exponential():
    v, mass = exponential_quadrature()
    for power, moment in enumerate([1, 1, 2, 6, 24]):
        assert (v**power * mass).sum().item() == pytest.approx(moment, rel=1e-10)
    for s in (0.0, 1e-3, 1.0, 1e4):  # C / (C + s) = E exp(-v s / C), here with C = 1
        assert (torch.exp(-v * s) * mass).sum().item() == pytest.approx(1 / (1 + s), rel=1e-10)


@pytest.mark.parametrize(("dimensions", "radius"), [(1, 10), (7, 10), (7, 100), (64, 100)])
def test_imq_pulls_codes_far_from_the_origin_as_the_reference(dimensions, radius):
    # |z|^2 up to 1e4 D, where Gauss-Laguerre quadrature fails.
    z_ND = radius * codes(20, dimensions)
    expected = reference(z_ND, Formulas("imq", dimensions), "u")
    assert_agrees(computed(z_ND, kernel="imq"), expected)


@settings(max_examples=30, deadline=None)
@given(
    kernel=st.sampled_from(KERNELS),
    estimator=st.sampled_from(ESTIMATORS),
    prior=st.sampled_from(["normal", "sampled"]),
    real=st.lists(st.booleans(), min_size=2, max_size=12).filter(lambda rows: sum(rows) >= 2),
)
def test_rows_of_weight_0_count_as_left_out(kernel, estimator, prior, real):
    z_ND, weights_N = codes(len(real), 5), torch.tensor(real).float()
    z_ND[weights_N == 0] *= 50
    options = {"kernel": kernel, "estimator": estimator, "prior": prior}
    value, gradient = computed(z_ND, weights_B=weights_N, **options)
    without, gradient_without = computed(z_ND[weights_N > 0], **options)
    torch.testing.assert_close(value, without, rtol=1e-5, atol=2e-6)
    assert (gradient[weights_N == 0] == 0).all()
    torch.testing.assert_close(gradient[weights_N > 0], gradient_without, rtol=1e-4, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(kernel=st.sampled_from(KERNELS), order=st.permutations(range(9)))
def test_order_of_the_rows_does_not_matter(kernel, order):
    z_ND, order = codes(9, 4), torch.tensor(order)
    value, gradient = computed(z_ND, kernel=kernel)
    shuffled, gradient_shuffled = computed(z_ND[order], kernel=kernel)
    torch.testing.assert_close(shuffled, value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient_shuffled, gradient[order], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kernel", KERNELS)
def test_turning_the_codes_turns_the_gradient(kernel):
    z_ND = codes(30, 6)
    turn_DD, _ = torch.linalg.qr(codes(6, 6, seed=1))
    value, gradient = computed(z_ND, kernel=kernel)
    turned, gradient_turned = computed(z_ND @ turn_DD, kernel=kernel)
    torch.testing.assert_close(turned, value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient_turned, gradient @ turn_DD, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prior", ["normal", "sampled"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("weights", [None, [0, 0, 0], [0, 1, 0]])
def test_fewer_than_two_real_rows_give_0_with_zero_gradient(weights, estimator, prior):
    z_ND = codes(1 if weights is None else 3, 4)
    weights_N = None if weights is None else torch.tensor(weights)
    options = {"weights_B": weights_N, "estimator": estimator, "prior": prior}
    value, gradient = computed(z_ND, **options)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(z_ND))


def test_no_rows_give_0():
    assert mmd(torch.zeros(0, 4)) == 0


@pytest.mark.parametrize("kernel", ["multi_rbf", "imq"])
@pytest.mark.parametrize("dimensions", [2, 16, 64])
def test_degenerate_codes_score_above_draws_of_the_prior(kernel, dimensions):
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(10, 512, dimensions, generator=generator)
    good = max(mmd(z_ND, kernel=kernel).item() for z_ND in draws)
    bad = {
        "all zero": torch.zeros_like(draws[0]),
        "one point": torch.ones(dimensions).expand(512, -1),
        "variance 0.5": draws[0] * 0.5**0.5,
        "variance 2": draws[0] * 2**0.5,
        "mean 1": draws[0] + 1,
    }
    scores = {name: mmd(z_ND, kernel=kernel).item() for name, z_ND in bad.items()}
    assert min(scores.values()) > good, scores


@pytest.mark.parametrize("kernel", KERNELS)
def test_u_statistic_of_the_prior_averages_to_0(kernel):
    generator = torch.Generator().manual_seed(0)
    values = torch.stack(
        [mmd(torch.randn(64, 8, generator=generator), kernel=kernel) for _ in range(60)]
    )
    assert abs(values.mean()) < 5 * values.std() / len(values) ** 0.5


@pytest.mark.parametrize("kernel", KERNELS)
def test_v_statistic_is_never_negative(kernel):
    for seed in range(5):
        z_ND = codes(20, 3, seed)
        assert mmd(z_ND, kernel=kernel, estimator="v") > -1e-6


def test_a_step_down_the_gradient_lowers_the_statistic():
    z_ND = codes(64, 8)
    before, gradient = computed(z_ND)
    assert mmd(z_ND - 0.1 * gradient / gradient.norm()) < before


def test_gradient_scale_multiplies_the_gradient_and_not_the_value():
    z_ND = codes(9, 4)
    value, gradient = computed(z_ND)
    scaled, gradient_scaled = computed(z_ND, gradient_scale=3.0)
    assert scaled == value
    torch.testing.assert_close(gradient_scaled, 3 * gradient)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_gather_finished_later_gives_the_same(kernel):
    z_ND, weights_N = codes(9, 4).requires_grad_(), torch.tensor([1.0] * 7 + [0.0] * 2)
    pending = start_gather(z_ND, weights_B=weights_N)
    value = pending.finish(kernel=kernel, estimator="v")
    (gradient,) = torch.autograd.grad(value, z_ND)
    options = {"weights_B": weights_N, "kernel": kernel, "estimator": "v"}
    expected, expected_gradient = computed(z_ND.detach(), **options)
    assert value.item() == expected.item()
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("prior", ["normal", "sampled"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_changes_nothing(kernel, prior):
    z_ND = codes(30, 16)
    value, gradient = computed(z_ND, kernel=kernel, prior=prior)
    with torch.autocast("cpu", torch.bfloat16):
        autocast_value, autocast_gradient = computed(z_ND, kernel=kernel, prior=prior)
    assert torch.equal(autocast_value, value)
    assert torch.equal(autocast_gradient, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_codes_of_another_precision_are_computed_in_fp32(dtype):
    z_ND = codes(30, 16).to(dtype)
    value, gradient = computed(z_ND)
    expected, expected_gradient = computed(z_ND.float())
    assert value.item() == expected.item()
    assert gradient.dtype == dtype
    assert torch.equal(gradient, expected_gradient.to(dtype))


@pytest.mark.parametrize("option", [{"kernel": "cubic"}, {"prior": "uniform"}, {"estimator": "w"}])
def test_an_unknown_name_is_a_value_error_that_shows_it(option):
    (name,) = option.values()
    with pytest.raises(ValueError, match=name):
        mmd(codes(5, 3), **option)


@pytest.mark.parametrize("shape", [(5,), (5, 0), (2, 3, 4), ()])
def test_codes_that_are_not_rows_of_coordinates_are_a_value_error(shape):
    with pytest.raises(ValueError, match="codes"):
        mmd(torch.zeros(shape))
