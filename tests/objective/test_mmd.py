"""What mmd() promises beyond the table of cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from t5vae.objective import mmd, mmd_of, start_gather
from t5vae.objective.kernels import make_kernel
from t5vae.objective.priors import draws, normal_constant, normal_cross
from tests.objective import reference

KERNELS = ["rbf", "multi_rbf", "imq", "legacy"]
PRIORS = ["normal", "uniform", "sampled"]
ESTIMATORS = ["u", "v"]


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


def assert_agrees(z_ND: Tensor, loss=1e-6, gradient=1e-5, **options) -> None:
    value, gradient_ND = computed(z_ND, **options)
    exact_ND = z_ND.double().requires_grad_()
    terms = reference.terms(exact_ND, **options)
    (expected_ND,) = torch.autograd.grad(terms.value, exact_ND)
    assert value.dtype == torch.float32
    assert abs(value.item() - terms.value.item()) <= loss * terms.magnitude
    assert (gradient_ND - expected_ND).norm() <= gradient * expected_ND.norm()


@pytest.mark.parametrize("sigma", [0.5, 3.0])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_priors_scale_enters_as_in_the_reference(kernel, prior, sigma):
    assert_agrees(sigma * codes(20, 3), kernel=kernel, prior=prior, sigma=sigma)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sampled_prior_is_the_formula_on_the_same_draws(estimator):
    options = {"prior": "sampled", "sigma": 1.5, "generator_seed": 11}
    assert_agrees(codes(40, 7), estimator=estimator, **options)


def test_draws_of_the_prior_repeat_with_their_seed_and_have_its_scale():
    drawn = draws(4000, 5, 2.0, 3)
    assert torch.equal(drawn, draws(4000, 5, 2.0, 3))
    assert not torch.equal(drawn, draws(4000, 5, 2.0, 4))
    assert drawn.mean().item() == pytest.approx(0, abs=5 * 2 / 20000**0.5)
    assert drawn.std().item() == pytest.approx(2, abs=5 * 2 / 40000**0.5)


@pytest.mark.parametrize("prior", ["normal", "uniform"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dimensions", [1, 7])
def test_the_references_closed_forms_are_expectations_under_the_prior(kernel, dimensions, prior):
    generator = torch.Generator().manual_seed(0)
    formulas = reference.Formulas(kernel, dimensions, 1.3)
    shape = (2, 200_000, dimensions)
    draw = torch.randn if prior == "normal" else torch.rand
    p, q = draw(shape, generator=generator, dtype=torch.float64)
    if prior == "uniform":
        p, q = 2 * p - 1, 2 * q - 1
    p, q = 1.3 * p, 1.3 * q
    z = torch.full((1, dimensions), 0.8, dtype=torch.float64)
    h, c = {
        "normal": (formulas.normal_h(z), formulas.normal_c()),
        "uniform": (formulas.uniform_h(z), formulas.uniform_c()),
    }[prior]
    for phi, closed in (
        (formulas.phi((p - z).square().sum(1)), h),
        (formulas.phi((p - q).square().sum(1)), c),
    ):
        five_errors = 5 * phi.std().item() / len(phi) ** 0.5
        assert phi.mean().item() == pytest.approx(closed.item(), abs=five_errors)


def test_the_references_quadrature_integrates_the_exponential():
    v, mass = reference.exponential_quadrature()
    for power, moment in enumerate([1, 1, 2, 6, 24]):
        assert (v**power * mass).sum().item() == pytest.approx(moment, rel=1e-10)
    for s in (0.0, 1e-3, 1.0, 1e4):  # C / (C + s) = E exp(-v s / C), here with C = 1
        assert (torch.exp(-v * s) * mass).sum().item() == pytest.approx(1 / (1 + s), rel=1e-10)


@pytest.mark.parametrize("dimensions", [1, 64, 1000])
def test_imqs_expectations_are_exact_to_1e_7_at_any_distance(dimensions):
    formulas = reference.Formulas("imq", dimensions)
    mixture = make_kernel("imq", dimensions).mixture()
    for radius in (0.0, 0.1, 1.0, 10.0, 100.0):
        z_1D = torch.full((1, dimensions), radius)
        h = 1 + normal_cross(z_1D, mixture, 1.0)[0].item()
        assert h == pytest.approx(formulas.normal_h(z_1D.double()).item(), rel=1e-7)
    c = 1 + normal_constant(dimensions, mixture, 1.0)
    assert c == pytest.approx(formulas.normal_c().item(), rel=1e-7)


@pytest.mark.parametrize(("dimensions", "radius"), [(1, 10), (1, 100), (7, 100), (64, 100)])
def test_imq_pulls_codes_far_out_as_the_reference_says(dimensions, radius):
    # |z|^2 up to 1e4 D, where Gauss-Laguerre quadrature fails.
    assert_agrees(radius * codes(20, dimensions), kernel="imq")


@settings(max_examples=30, deadline=None)
@given(
    kernel=st.sampled_from(KERNELS),
    estimator=st.sampled_from(ESTIMATORS),
    prior=st.sampled_from(PRIORS),
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


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("weights", [[0, 0, 0], [0, 1, 0]])
def test_fewer_than_two_rows_that_count_give_0_and_a_warning(weights, estimator, prior, caplog):
    z_ND = codes(3, 4)
    options = {"weights_B": torch.tensor(weights), "estimator": estimator, "prior": prior}
    value, gradient = computed(z_ND, **options)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(z_ND))
    assert "fewer than two" in caplog.text


@pytest.mark.parametrize("kernel", ["multi_rbf", "imq"])
@pytest.mark.parametrize("dimensions", [2, 16, 64])
def test_degenerate_codes_score_far_above_draws_of_the_prior(kernel, dimensions):
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(12, 256, dimensions, generator=generator)
    good = torch.stack([mmd(z_ND, kernel=kernel) for z_ND in draws])
    margin = good.mean() + 10 * good.std()
    bad = {
        "all zero": torch.zeros_like(draws[0]),
        "one point": torch.ones(dimensions).expand(256, -1),
        "variance 0.5": draws[0] * 0.5**0.5,
        "variance 2": draws[0] * 2**0.5,
        "mean 1": draws[0] + 1,
        "half the coordinates dead": draws[0] * (torch.arange(dimensions) % 2),
    }
    scores = {name: mmd(z_ND, kernel=kernel).item() for name, z_ND in bad.items()}
    assert min(scores.values()) > margin, scores


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
    pending = start_gather(z_ND, counting_WB=weights_N[None].numpy() > 0)
    value = mmd_of(pending, kernel=kernel, estimator="v")
    (gradient,) = torch.autograd.grad(value, z_ND)
    options = {"weights_B": weights_N, "kernel": kernel, "estimator": "v"}
    expected, expected_gradient = computed(z_ND.detach(), **options)
    assert value.item() == expected.item()
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("prior", PRIORS)
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


@pytest.mark.parametrize(
    "option",
    [{"kernel": "cubic"}, {"prior": "cauchy"}, {"implementation": "cuda"}, {"estimator": "w"}],
)
def test_an_unknown_name_is_a_value_error_that_shows_it(option):
    (name,) = option.values()
    with pytest.raises(ValueError, match=name):
        mmd(codes(5, 3), **option)


@pytest.mark.parametrize("shape", [(5,), (5, 0), (0, 5), (2, 3, 4), ()])
@pytest.mark.parametrize("function", [mmd, start_gather])
def test_codes_that_are_not_rows_of_coordinates_are_a_value_error(shape, function):
    with pytest.raises(ValueError, match="codes have shape"):
        function(torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_codes_that_are_not_finite_are_a_value_error(value):
    z_ND = codes(5, 3)
    z_ND[2, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        mmd(z_ND)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_gather_lets_codes_pass_that_are_not_finite_and_its_value_tells(kernel):
    z_ND = codes(5, 3)
    z_ND[2, 1] = float("nan")
    assert mmd_of(start_gather(z_ND), kernel=kernel).isnan()


def test_one_code_is_too_few_for_the_unbiased_estimator():
    with pytest.raises(ValueError, match="at least 2"):
        mmd(codes(1, 3))
