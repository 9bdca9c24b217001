"""Measure what the regularisers see: faults, bandwidth, U against V, gathering, averaging.

    python benchmarks/regularisers.py [--quick | --write]

Shapes: N codes, D latent size, R repetitions, b codes of each of W ranks, P parameters.
Every draw is seeded: two runs print the same.
"""

import math
from collections.abc import Callable

import torch
from _report import Block, Page, installed, short, table
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from t5vae.objective import mmd, sliced_epps_pulley
from t5vae.objective.kernels import make_kernel

COUNT, SLICES, SEEN = 512, 256, 5.0
DIMENSIONS, RANKS, LOCAL = 128, 8, (4, 16, 64)
KERNELS = ("rbf", "multi_rbf", "imq", "legacy")


# Faults


def original(z_ND: Tensor, seed: int) -> Tensor:
    return mmd(z_ND, "legacy", "sampled", "v", generator_seed=seed)


SCORES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "`imq`": lambda z, seed: mmd(z, "imq"),
    "`multi_rbf`": lambda z, seed: mmd(z, "multi_rbf"),
    "`rbf`": lambda z, seed: mmd(z, "rbf"),
    "slices": lambda z, seed: sliced_epps_pulley(z, slices=SLICES, axes=False, generator_seed=seed),
    "axes": lambda z, seed: sliced_epps_pulley(z, slices=0, axes=True),
    "original": original,
    "original of tanh": lambda z, seed: original(z.tanh(), seed),
}
JUDGED_BY = {"original of tanh": "original"}
"""The column whose scores of the prior judge another."""


def half_dead(count: int, dimensions: int) -> Tensor:
    z_ND = torch.randn(count, dimensions)
    z_ND[:, : dimensions // 2] = 0
    return z_ND


def clustered(count: int, dimensions: int) -> Tensor:
    centres_ND = torch.randn(16, dimensions)[torch.randint(16, (count,))]
    return centres_ND + 0.05 * torch.randn(count, dimensions)


def heavy_tailed(count: int, dimensions: int) -> Tensor:
    """Student's t with 3 degrees of freedom, over its standard deviation sqrt 3."""
    chi_squared_ND = torch.randn(3, count, dimensions).square().sum(0)
    return torch.randn(count, dimensions) / chi_squared_ND.sqrt()


PRIOR = "N(0, I)"
CODES: dict[str, Callable[[int, int], Tensor]] = {
    PRIOR: torch.randn,
    "all zero": torch.zeros,
    "all one point": lambda n, d: torch.randn(1, d).repeat(n, 1),
    "half the coordinates dead": half_dead,
    "half dead, the rest times √2": lambda n, d: math.sqrt(2) * half_dead(n, d),
    "variance 0.5": lambda n, d: math.sqrt(0.5) * torch.randn(n, d),
    "variance 2": lambda n, d: math.sqrt(2) * torch.randn(n, d),
    "mean shifted by 1": lambda n, d: torch.randn(n, d) + 1,
    "mean shifted by 0.1": lambda n, d: torch.randn(n, d) + 0.1,
    "saturated: all ±1": lambda n, d: torch.randn(n, d).sign(),
    "16 clusters of sd 0.05": clustered,
    "uniform on (-1, 1)": lambda n, d: 2 * torch.rand(n, d) - 1,
    "on the sphere of radius √D": lambda n, d: math.sqrt(d) * normalize(torch.randn(n, d)),
    "heavy tails (t, 3 df, variance 1)": heavy_tailed,
    "tanh of N(0, I)": lambda n, d: torch.randn(n, d).tanh(),
}
RAW = (PRIOR, "all zero", "variance 0.5", "mean shifted by 0.1", "saturated: all ±1")


def scores_of(codes: str, dimensions: int, repeats: int) -> dict[str, Tensor]:
    """Of each regulariser [R]."""
    found: dict[str, list[Tensor]] = {name: [] for name in SCORES}
    for seed in range(repeats):
        z_ND = CODES[codes](COUNT, dimensions)
        for name, score in SCORES.items():
            found[name].append(score(z_ND, seed))
    return {name: torch.stack(values).double() for name, values in found.items()}


def verdict(score_R: Tensor, prior_R: Tensor) -> str:
    """The z-score of the mean, marked if seen or rewarded."""
    difference = score_R.mean() - prior_R.mean()
    error = (score_R.var() / len(score_R) + prior_R.var() / len(prior_R)).sqrt()
    z = float(difference / prior_R.std())
    if z > SEEN:
        return f"**{short(z)}**"
    return short(z) + (" ↓" if difference < -3 * error else "")


def fault_tables(dimensions: int, baseline: int, repeats: int) -> str:
    torch.manual_seed(dimensions)
    scores = {
        codes: scores_of(codes, dimensions, baseline if codes == PRIOR else repeats)
        for codes in CODES
    }
    prior = {name: scores[PRIOR][JUDGED_BY.get(name, name)] for name in SCORES}
    rows = [
        (codes, *(verdict(score_R, prior[name]) for name, score_R in found.items()))
        for codes, found in scores.items()
    ]
    raw = [(codes, *(f"{s_R.mean():.2e}" for s_R in scores[codes].values())) for codes in RAW]
    spread = (f"sd of {PRIOR}", *(f"{s_R.std():.2e}" for s_R in scores[PRIOR].values()))
    return (
        f"D = {dimensions}, {baseline} draws of the prior, {repeats} of each fault:\n\n"
        f"{table(('codes', *SCORES), rows)}\nSome of the mean scores themselves:\n\n"
        f"{table(('codes', *SCORES), [*raw, spread])}"
    )


def faults(quick: bool) -> Block:
    sizes = ((128, 20, 5), (1000, 20, 5)) if quick else ((128, 200, 20), (1000, 100, 10))
    return Block("faults", "\n".join(fault_tables(*size) for size in sizes))


# The original's bandwidth


def original_formula(z_ND: Tensor, p_ND: Tensor) -> tuple[Tensor, Tensor]:
    """MMD^2 of the original as it wrote it, in fp64, and (2/D^2) |mean(z) - mean(p)|^2."""
    count, dimensions = z_ND.shape
    x_ND = torch.cat([z_ND, p_ND]).double()
    squared_N = x_ND.square().sum(1)
    s_NN = (squared_N[:, None] + squared_N - 2 * x_ND @ x_ND.T).clamp_min(0)
    sign_N = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(count) / count
    value = sign_N @ torch.expm1(-s_NN / dimensions**2) @ sign_N
    return value, 2 / dimensions**2 * (sign_N @ x_ND).square().sum()


def bandwidth(quick: bool) -> Block:
    torch.manual_seed(2)
    repeats = 4 if quick else 40

    def cell(codes: str, *shape: int) -> str:
        draws = (original_formula(CODES[codes](*shape), torch.randn(shape)) for _ in range(repeats))
        value, means = (torch.stack(part_R).mean() for part_R in zip(*draws, strict=True))
        return f"{value:.2e} ({means / value:.0%})"

    columns = (PRIOR, "all zero", "variance 0.5", "variance 2")
    rows = [
        (str(dimensions), str(count), *(cell(codes, count, dimensions) for codes in columns))
        for dimensions in (10, 128, 1000)
        for count in (64, COUNT)
    ]
    return Block("bandwidth", table(("D", "N", *columns), rows))


# U against V


def expected(kernel: str, dimensions: int, v: Tensor, count: float = math.inf) -> Tensor:
    """E MMD^2 of codes N(0, vI): of the U-statistic, or of the V-statistic of `count` codes.

    Rustamov, arXiv 1901.03227: E exp(-gamma s) = (1 + 2 gamma t)^(-D/2) where t is the variance of
    a coordinate of x - y. Less 1, so that nearly flat kernels keep their digits.
    """
    mixture = make_kernel(kernel, dimensions).mixture()
    total = torch.zeros_like(v)
    for weight, gamma in zip(mixture.weights, mixture.gammas, strict=True):
        within, cross, prior = (
            torch.expm1(-dimensions / 2 * torch.log1p(2 * gamma * t))
            for t in (2 * v, 1 + v, torch.full_like(v, 2))
        )
        total = total + weight * ((1 - 1 / count) * within - 2 * cross + prior)
    return total


def best_variance(kernel: str, dimensions: int, count: float) -> float:
    v = torch.arange(0, 3, 0.001, dtype=torch.float64)
    return float(v[expected(kernel, dimensions, v, count).argmin()])


def optimum(_: bool) -> Block:
    rows = [
        (str(dimensions), name, *(short(best_variance(k, dimensions, count)) for k in KERNELS))
        for dimensions in (16, 128, 1000)
        for name, count in (("U, any N", math.inf), *((f"V, N = {n}", n) for n in (*LOCAL, COUNT)))
    ]
    header = ("D", "statistic", *(f"`{kernel}`" for kernel in KERNELS))
    return Block("optimum", table(header, rows))


# Gathering


def local_average(z_ND: Tensor, estimator: str = "u") -> Tensor:
    batches = z_ND.chunk(RANKS)
    return torch.stack([mmd(z_bD, "imq", estimator=estimator) for z_bD in batches]).mean()


def encoder_gradients(x_ND: Tensor, A_DD: Tensor, statistic: Callable) -> list[Tensor]:
    """Of a statistic of z = Ax + m, at m = 0, to three sets of parameters: [P] each."""
    z_ND = (x_ND @ A_DD.T).requires_grad_()
    (gradient_ND,) = torch.autograd.grad(statistic(z_ND), z_ND)
    matrix_DD, mean_D = gradient_ND.T @ x_ND, gradient_ND.sum(0)
    scale_D = (matrix_DD * A_DD).sum(1)
    whole = torch.cat([matrix_DD.flatten(), mean_D])
    return [whole, torch.cat([scale_D, mean_D]), scale_D.sum()[None]]


def variance_ratio(above_RP: Tensor, below_RP: Tensor, resamples: int = 400) -> str:
    """The ratio of the variances summed over parameters, with its bootstrap error.

    A resample has weights w over the repetitions, and the variance sum_r w_r |g_r|^2 - |w g|^2.
    """
    repeats = len(above_RP)
    drawn = one_hot(torch.randint(repeats, (resamples, repeats)), repeats).sum(1)
    weights = torch.cat([torch.ones(1, repeats), drawn]).double() / repeats
    grams = (gradient_RP.double() @ gradient_RP.double().T for gradient_RP in (above_RP, below_RP))
    above, below = (weights @ g.diag() - ((weights @ g) * weights).sum(1) for g in grams)
    ratios = above / below
    return f"{ratios[0]:.3f} ± {ratios[1:].std():.3f}"


def gradient_ratios(A_DD: Tensor, b: int, repeats: int) -> list[str]:
    """Local over gathered for each set of parameters, then sampled over closed-form prior."""
    gradients = []
    for seed in range(repeats):
        x_ND = torch.randn(RANKS * b, DIMENSIONS)
        statistics: tuple[Callable, ...] = (
            lambda z: mmd(z, "imq"),
            local_average,
            lambda z, seed=seed: mmd(z, "imq", "sampled", generator_seed=seed),
        )
        gradients.append([encoder_gradients(x_ND, A_DD, each) for each in statistics])
    gathered, *others = (
        [torch.stack(parameters_RP) for parameters_RP in zip(*of_one, strict=True)]
        for of_one in zip(*gradients, strict=True)
    )
    return [variance_ratio(*pair) for other in others for pair in zip(other, gathered, strict=True)]


def gathering(quick: bool) -> Block:
    torch.manual_seed(4)
    repeats = 10 if quick else 200
    encoders = {
        "A = I": torch.eye(DIMENSIONS),
        "A random": torch.randn(DIMENSIONS, DIMENSIONS) / math.sqrt(DIMENSIONS),
    }
    sets = ("all of A and m", "scale and mean of each coordinate", "one scale of all")
    rows = []
    for point, A_DD in encoders.items():
        columns = [gradient_ratios(A_DD, b, repeats) for b in LOCAL]
        names = [(kind, point, name) for kind in ("local", "sampled") for name in sets]
        rows += [(*name, *row) for name, *row in zip(names, *columns, strict=True)]
    rows.sort(key=lambda row: row[0])
    header = ("ratio of variances", "at", "parameters", *(f"b = {b}" for b in LOCAL))
    return Block("gathering", table(header, rows))


# Averaging


def value_and_slope(z_ND: Tensor, statistic: Callable) -> Tensor:
    """A statistic, and its derivative to the logarithm of the variance of the codes: [2]."""
    value = statistic(z_ND.requires_grad_())
    (gradient_ND,) = torch.autograd.grad(value, z_ND)
    return torch.stack([value, (gradient_ND * z_ND).sum() / 2]).detach()


def averaging(quick: bool) -> Block:
    torch.manual_seed(5)
    repeats = 20 if quick else 200
    statistics: dict[str, Callable] = {
        "U, average": local_average,
        "U, one of all": lambda z: mmd(z, "imq"),
        "V, average": lambda z: local_average(z, "v"),
        "V, one of all": lambda z: mmd(z, "imq", estimator="v"),
    }
    found: dict[str, list[str]] = {name: [] for name in statistics}
    for b in LOCAL:
        draws = [math.sqrt(0.5) * torch.randn(RANKS * b, DIMENSIONS) for _ in range(repeats)]
        for name, statistic in statistics.items():
            both_R2 = torch.stack([value_and_slope(z_ND, statistic) for z_ND in draws])
            mean_2, error_2 = both_R2.mean(0), both_R2.std(0) / math.sqrt(repeats)
            found[name] += [f"{mean_2[i]:.5f} ± {error_2[i]:.5f}" for i in range(2)]
    v = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    value = expected("imq", DIMENSIONS, v)
    slope = torch.autograd.grad(value, v)[0] * v
    text = (
        f"The distance of the distributions is {value.item():.5f}, its derivative to log v "
        f"{slope.item():.5f}.\n\n"
    )
    header = [f"{what}, b = {b}" for b in LOCAL for what in ("value", "derivative")]
    rows = [(name, *row) for name, row in found.items()]
    return Block("averaging", text + table(("", *header), rows))


def main() -> None:
    page = Page(__doc__, "benchmarks/regularisers.md", quick="fewer draws")
    quick = page.options().quick
    torch.set_num_threads(1)
    parts = (faults, bandwidth, optimum, gathering, averaging)
    page.publish([part(quick) for part in parts], installed("torch"))


if __name__ == "__main__":
    main()
