"""sliced_epps_pulley() against its formula in fp64, on faulty codes, and over gloo ranks.

One test starts this file itself, once for each of four ranks; two of them also form a group.
"""

import math
import sys
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from t5vae.objective import mmd
from t5vae.objective.epps_pulley import _directions, sliced_epps_pulley

ESTIMATORS = ["u", "v"]


def codes(count: int, dimensions: int, seed: int = 0) -> Tensor:
    """Codes that are not yet the prior's: another scale and mean in each coordinate."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 1.5, dimensions)
    z_ND = torch.randn(count, dimensions, generator=generator)
    return z_ND * scale + 0.3 * scale.flip(0)


def computed(z_ND: Tensor, **options) -> tuple[Tensor, Tensor]:
    z_ND = z_ND.clone().requires_grad_()
    value = sliced_epps_pulley(z_ND, **options)
    (gradient,) = torch.autograd.grad(value, z_ND)
    return value.detach(), gradient


def directions(dimensions: int, slices: int, axes: bool, seed: int = 0) -> Tensor:
    random = _directions(slices, dimensions, seed)
    return torch.cat([random, torch.eye(dimensions)]) if axes else random


def reference(z_ND, directions_MD, estimator="u", sigma=1.0) -> tuple[Tensor, Tensor]:
    """The formula by autograd: the trapezoid rule over [-8, 8] in steps of 0.05."""
    z_ND = z_ND.detach().double().requires_grad_()
    count = len(z_ND)
    t_K = torch.linspace(-8, 8, 321, dtype=torch.float64)
    normal_K1 = torch.exp(-t_K.square() / 2)[:, None]
    p_NM = z_ND @ directions_MD.double().T / sigma
    phi_KM = torch.exp(1j * t_K[:, None, None] * p_NM).mean(1)
    square_KM = phi_KM.real**2 + phi_KM.imag**2
    if estimator == "u":
        square_KM = (count * square_KM - 1) / (count - 1)
    distance_KM = square_KM - 2 * phi_KM.real * normal_K1 + normal_K1**2
    weight_K1 = normal_K1 / math.sqrt(2 * math.pi)
    value = torch.trapezoid(weight_K1 * distance_KM, t_K, dim=0).mean()
    (gradient,) = torch.autograd.grad(value, z_ND)
    return value.detach(), gradient


def closed_form(z_ND: Tensor, directions_MD: Tensor, estimator: str) -> float:
    """The integral without quadrature: the mean of cos(t d) under N(0, 1) is exp(-d^2 / 2)."""
    p_MN = directions_MD.double() @ z_ND.double().T
    count = len(z_ND)
    pairs_M = torch.exp(-(p_MN[:, :, None] - p_MN[:, None]).square() / 2).sum((1, 2))
    if estimator == "u":
        within_M = (pairs_M - count) / (count * (count - 1))
    else:
        within_M = pairs_M / count**2
    cross_M = torch.exp(-p_MN.square() / 4).mean(1) / math.sqrt(2)
    return (within_M - 2 * cross_M + 1 / math.sqrt(3)).mean().item()


def assert_agrees(actual, expected):
    value, gradient = actual
    expected_value, expected_gradient = expected
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected_value.item(), abs=2e-6)
    error = (gradient - expected_gradient).norm()
    assert error <= 1e-5 * expected_gradient.norm(), error / expected_gradient.norm()


@pytest.mark.parametrize(("slices", "axes"), [(5, True), (6, False), (0, True)])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("count", "dimensions"), [(2, 1), (2, 7), (5, 3), (100, 1), (200, 16)])
def test_value_and_gradient_are_the_references(count, dimensions, estimator, slices, axes):
    z_ND = codes(count, dimensions)
    actual = computed(z_ND, slices=slices, axes=axes, estimator=estimator, generator_seed=3)
    expected = reference(z_ND, directions(dimensions, slices, axes, 3), estimator)
    assert_agrees(actual, expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("sigma", [0.5, 3.0])
def test_the_priors_scale_enters_as_in_the_reference(sigma, estimator):
    z_ND = sigma * codes(40, 7)
    actual = computed(z_ND, slices=9, estimator=estimator, sigma=sigma)
    assert_agrees(actual, reference(z_ND, directions(7, 9, True), estimator, sigma))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 7.0])
def test_quadrature_gives_the_integral_where_projections_are_within_7(scale, estimator):
    z_ND = torch.linspace(-scale, scale, 30)[:, None].repeat(1, 2)
    value = sliced_epps_pulley(z_ND, slices=0, estimator=estimator)
    assert value.item() == pytest.approx(closed_form(z_ND, torch.eye(2), estimator), abs=1e-6)


def test_repeating_every_row_changes_no_mean_over_rows():
    # Many rows take several chunks of directions, few rows one.
    z_ND, copies = codes(150, 50), 40
    value, gradient = computed(z_ND, slices=70, estimator="v")
    repeated, gradient_repeated = computed(z_ND.repeat(copies, 1), slices=70, estimator="v")
    torch.testing.assert_close(repeated, value, rtol=1e-6, atol=0)
    expected = gradient.repeat(copies, 1) / copies
    assert (gradient_repeated - expected).norm() <= 1e-5 * expected.norm()


def test_u_statistic_of_the_prior_averages_to_0_and_v_to_what_the_docstring_says():
    generator = torch.Generator().manual_seed(0)
    draws = [2 * torch.randn(32, 4, generator=generator) for _ in range(200)]
    for estimator, mean in (("u", 0.0), ("v", (1 - 3**-0.5) / 32)):
        options = {"slices": 16, "estimator": estimator, "sigma": 2.0}
        values = torch.stack([sliced_epps_pulley(z_ND, **options) for z_ND in draws])
        error = values.std().item() / len(values) ** 0.5
        assert error < 1e-3
        assert values.mean().item() == pytest.approx(mean, abs=5 * error)


def faults(z_ND: Tensor) -> dict[str, Tensor]:
    """Codes with a fault each, made from draws of the prior."""
    count, dimensions = z_ND.shape
    half_dead = z_ND * (torch.arange(dimensions) % 2)
    row = torch.arange(count)
    on_axes = torch.zeros_like(z_ND)
    on_axes[row, row % dimensions] = dimensions**0.5 * z_ND[:, 0].sign()
    return {
        "all zero": torch.zeros_like(z_ND),
        "one point": z_ND[:1].expand(count, -1),
        "saturated": z_ND.sign(),
        "half dead": half_dead,
        "half dead, the rest scaled up": half_dead * 2**0.5,
        "variance 0.5": z_ND * 0.5**0.5,
        "variance 2": z_ND * 2**0.5,
        "mean 1": z_ND + 1,
        "clusters on the axes": on_axes + 0.05 * z_ND,
    }


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dimensions", [2, 16, 128])
def test_faulty_codes_score_clearly_above_draws_of_the_prior(dimensions, estimator):
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(6, 512, dimensions, generator=generator)
    good = max(sliced_epps_pulley(z_ND, estimator=estimator).item() for z_ND in draws)
    for name, z_ND in faults(draws[0]).items():
        assert sliced_epps_pulley(z_ND, estimator=estimator) > 3 * good, name


def test_axes_see_saturated_codes_that_an_isotropic_kernel_takes_for_the_prior():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(6, 512, 64, generator=generator)
    saturated = faults(draws[0])["saturated"]
    assert mmd(saturated) <= max(mmd(z_ND) for z_ND in draws)
    assert sliced_epps_pulley(saturated, slices=0) > 50 * max(
        sliced_epps_pulley(z_ND, slices=0) for z_ND in draws
    )


def test_steps_down_the_gradient_bring_saturated_codes_to_the_prior():
    z_ND = faults(codes(128, 4))["saturated"]
    z_ND = z_ND + 0.1 * codes(128, 4, seed=1)
    before = sliced_epps_pulley(z_ND)
    for seed in range(50):
        _, gradient = computed(z_ND, generator_seed=seed)
        z_ND = z_ND - 128 * gradient
    assert sliced_epps_pulley(z_ND) < 0.1 * before


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rows_of_weight_0_count_as_left_out(estimator):
    z_ND = codes(9, 5)
    weights_N = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0])
    z_ND[weights_N == 0] *= 50
    value, gradient = computed(z_ND, weights_B=weights_N, estimator=estimator)
    without, gradient_without = computed(z_ND[weights_N > 0], estimator=estimator)
    torch.testing.assert_close(value, without, rtol=1e-6, atol=1e-7)
    assert (gradient[weights_N == 0] == 0).all()
    torch.testing.assert_close(gradient[weights_N > 0], gradient_without, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("weights", [None, [0, 0, 0], [0, 1, 0]])
def test_fewer_than_two_real_rows_give_0_with_zero_gradient(weights, estimator):
    z_ND = codes(1 if weights is None else 3, 4)
    weights_N = None if weights is None else torch.tensor(weights)
    value, gradient = computed(z_ND, weights_B=weights_N, estimator=estimator)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(z_ND))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_codes_of_another_precision_are_computed_in_fp32(dtype):
    z_ND = codes(30, 16).to(dtype)
    value, gradient = computed(z_ND)
    expected, expected_gradient = computed(z_ND.float())
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient.to(dtype))


def test_autocast_changes_nothing():
    z_ND = codes(30, 16)
    value, gradient = computed(z_ND)
    with torch.autocast("cpu", torch.bfloat16):
        autocast_value, autocast_gradient = computed(z_ND)
    assert torch.equal(autocast_value, value)
    assert torch.equal(autocast_gradient, gradient)


def test_order_of_the_rows_does_not_matter():
    z_ND, order = codes(300, 8), torch.randperm(300, generator=torch.Generator().manual_seed(0))
    value, gradient = computed(z_ND)
    shuffled, gradient_shuffled = computed(z_ND[order])
    torch.testing.assert_close(shuffled, value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient_shuffled, gradient[order], rtol=1e-5, atol=1e-8)


def test_a_seed_draws_the_same_unit_vectors_again_and_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    z_ND = codes(30, 6)
    value, gradient = computed(z_ND, generator_seed=1)
    again, gradient_again = computed(z_ND, generator_seed=1)
    other, _ = computed(z_ND, generator_seed=2)
    assert torch.equal(again, value)
    assert torch.equal(gradient_again, gradient)
    assert other != value
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(_directions(40, 6, 1).norm(dim=1), torch.ones(40))


def test_gradient_scale_multiplies_the_gradient_and_not_the_value():
    value, gradient = computed(codes(9, 4))
    scaled, gradient_scaled = computed(codes(9, 4), gradient_scale=3.0)
    assert scaled == value
    torch.testing.assert_close(gradient_scaled, 3 * gradient)


ERRORS = [
    (torch.zeros(5), {}, "codes"),
    (torch.zeros(2, 3, 4), {}, "codes"),
    (torch.zeros(5, 0), {}, "codes"),
    (torch.zeros(0, 5), {}, "codes"),
    (torch.full((5, 3), math.nan), {}, "finite"),
    (torch.full((5, 3), math.inf), {}, "finite"),
    (torch.zeros(5, 3), {"estimator": "w"}, "'w'"),
    (torch.zeros(5, 3), {"slices": -1}, "-1"),
    (torch.zeros(5, 3), {"slices": 0, "axes": False}, "direction"),
]


@pytest.mark.parametrize(("z_ND", "options", "message"), ERRORS)
def test_what_cannot_be_computed_is_a_value_error(z_ND, options, message):
    with pytest.raises(ValueError, match=message):
        sliced_epps_pulley(z_ND, **options)


# Over ranks. Rows of each rank by name of the split; weights of all rows, 1 where not named.

WORLD = 4
SPLITS = {
    "two equal": ([4, 4], {}),
    "two unequal": ([7, 2], {}),
    "two, one quarantined": ([3, 5], {0: 0, 1: 0, 2: 0, 6: 0}),
    "two with one real row": ([2, 2], {0: 0, 1: 0, 3: 0}),
    "four equal": ([30, 30, 30, 30], {}),
    "four unequal": ([1, 60, 3, 17], {}),
    "four with quarantined rows": ([2, 3, 1, 2], {0: 0, 5: 0, 7: 0}),
    "four without a real row": ([1, 1, 1, 1], {0: 0, 1: 0, 2: 0, 3: 0}),
}
OPTIONS = [
    {"estimator": estimator, "axes": axes, "slices": 8, "generator_seed": 5}
    for estimator, axes in product(ESTIMATORS, [True, False])
]


def whole_batch(split: str) -> tuple[Tensor, Tensor]:
    rows, named = SPLITS[split]
    weights = torch.ones(sum(rows))
    for row, weight in named.items():
        weights[row] = weight
    return codes(sum(rows), 6), weights


def rank_main(rank: int, folder: Path) -> None:
    """What each rank runs: every case, its results written to a file."""
    store = f"file://{folder}/store"
    limit = timedelta(seconds=30)
    dist.init_process_group("gloo", store, rank=rank, world_size=WORLD, timeout=limit)
    pair = dist.new_group([0, 1])
    if rank == 0:  # alone: were anything communicated first, it would wait for the others
        for z_ND, options, message in ERRORS:
            with pytest.raises(ValueError, match=message):
                sliced_epps_pulley(z_ND, **options)

    results = {}
    for split, (rows, _) in SPLITS.items():
        if rank >= len(rows):
            continue
        z_ND, weights_N = whole_batch(split)
        z_BD = z_ND.split(rows)[rank].clone().requires_grad_()
        weights_B = weights_N.split(rows)[rank]
        group = pair if len(rows) == 2 else None
        with CommDebugMode() as forward:
            values = [
                sliced_epps_pulley(z_BD, weights_B=weights_B, group=group, **options)
                for options in OPTIONS
            ]
        with CommDebugMode() as backward:
            gradients = [torch.autograd.grad(value, z_BD)[0] for value in values]
        counts = forward.get_total_counts(), backward.get_total_counts()
        results[split] = ([value.item() for value in values], gradients, counts)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_ranks_give_the_value_and_gradient_of_one_process_on_the_whole_batch(run_ranks, tmp_path):
    run_ranks(__file__, WORLD, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]

    for split, (rows, _) in SPLITS.items():
        z_ND, weights_N = whole_batch(split)
        collectives = 2 if weights_N.sum() > 1 else 1  # how many rows count, and the sums
        for results in found[: len(rows)]:
            assert results[split][2] == (collectives * len(OPTIONS), 0)
        for case, options in enumerate(OPTIONS):
            expected, expected_gradient = computed(z_ND, weights_B=weights_N, **options)
            values = [results[split][0][case] for results in found[: len(rows)]]
            gradients = [results[split][1][case] for results in found[: len(rows)]]
            assert len(set(values)) == 1
            assert values[0] == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
            gradient = torch.cat(gradients) / len(rows)  # the engine's mean reduction
            error = (gradient - expected_gradient).norm()
            assert error <= 1e-5 * expected_gradient.norm(), (split, options, error)
            assert (gradient[weights_N == 0] == 0).all()


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
