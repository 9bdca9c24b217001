"""The metrics, as pure functions of strings, token ids and codes; definitions and sources inside.

What is a share or a mean over items comes as a `Ratio`, a float with an interval.

Shapes: N sequences, D latent size, M directions.
"""

from collections.abc import Callable, Collection, Sequence
from itertools import pairwise

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from torch import Generator, Tensor

from t5vae.evaluation.bootstrap import Ratio
from t5vae.latent.properties import Property

Ids = Sequence[Sequence[int]]


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> Ratio:
    """Share of predictions equal to their reference, character by character."""
    return Ratio([p == r for p, r in zip(predictions, references, strict=True)])


def token_accuracy(predictions: Ids, references: Ids) -> Ratio:
    """Share of the references' tokens, end tokens included, that the prediction has at the same
    position. On free-running output one token too many early on makes all later ones wrong."""
    hits = [
        sum(token == wanted for token, wanted in zip(prediction, reference, strict=False))
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return Ratio(hits, list(map(len, references)))


def edit_similarity(predictions: Sequence[str], references: Sequence[str]) -> Ratio:
    """Mean of 1 - d / max(length), d the Levenshtein distance in characters; two empty strings
    count as 1."""
    return Ratio(
        [
            Levenshtein.normalized_similarity(p, r)
            for p, r in zip(predictions, references, strict=True)
        ]
    )


def quality(
    samples: Sequence[str], known: Collection[str], is_valid: Callable[[str], bool] | None
) -> dict[str, Ratio | None]:
    """Validity, uniqueness and novelty of samples, as MOSES defines them (Polykovskiy et al.,
    arXiv 1811.12823), uniqueness over all samples instead of the first 1,000 or 10,000.

    Args:
        samples: generated strings.
        known: the training set, a set.
        is_valid: a checker; None takes every sample for valid and leaves `valid` None.

    Returns:
        valid: share of the samples that pass.
        unique: share of distinct strings among the valid ones.
        novel: share of the distinct valid ones that are not in the training set.
        valid_unique_novel: their product, the share of samples that are a valid, new string,
            each counted once.
        A share of nothing is 0. Intervals hold fixed which samples repeat an earlier one.
    """
    seen: set[str] = set()
    valid, first, new = [], [], []
    for text in samples:
        valid.append(is_valid is None or bool(is_valid(text)))
        first.append(valid[-1] and text not in seen)
        new.append(first[-1] and text not in known)
        if first[-1]:
            seen.add(text)
    return {
        "valid": None if is_valid is None else Ratio(valid),
        "unique": Ratio(first, valid),
        "novel": Ratio(new, first),
        "valid_unique_novel": Ratio(new),
    }


def interpolation(
    paths: Sequence[Sequence[str]],
    is_valid: Callable[[str], bool] | None,
    ends: Sequence[tuple[str, str]] | None = None,
) -> dict[str, Ratio | None]:
    """How good the strings on the way between two are; d is the Levenshtein distance in characters.

    Args:
        paths: strings of each path in order, both ends included.
        is_valid: a checker, or None.
        ends: the two texts that each path was to lead from and to.

    Returns:
        validity: share of all steps that pass; None without a checker.
        directness: mean over paths of d(first, last) / sum of d(step, next step). 1 is a path
            without detour; a jump from end to end is one too, so read it with the next two. Paths
            that never change are left out; None if there is no other.
        largest_step: mean over the same paths of the largest d(step, next step) / sum of all: 1
            is a jump, 1 over the number of steps an even walk.
        distinct: mean number of distinct strings on a path.
        exact_ends: with `ends`, share of paths that begin and end with those.
    """
    walks = [[Levenshtein.distance(a, b) for a, b in pairwise(texts)] for texts in paths]
    moving = [(texts, walk) for texts, walk in zip(paths, walks, strict=True) if any(walk)]
    found: dict[str, Ratio | None] = {
        "validity": None,
        "directness": None,
        "largest_step": None,
        "distinct": Ratio([len(set(texts)) for texts in paths]),
    }
    if is_valid is not None:
        passed = [sum(map(bool, map(is_valid, texts))) for texts in paths]
        found["validity"] = Ratio(passed, list(map(len, paths)))
    if moving:
        found["directness"] = Ratio(
            [Levenshtein.distance(texts[0], texts[-1]) / sum(walk) for texts, walk in moving]
        )
        found["largest_step"] = Ratio([max(walk) / sum(walk) for _, walk in moving])
    if ends is not None:
        found["exact_ends"] = Ratio(
            [(texts[0], texts[-1]) == pair for texts, pair in zip(paths, ends, strict=True)]
        )
    return found


def smoothness(
    texts: Sequence[str], centres: Sequence[str], is_valid: Callable[[str], bool] | None
) -> dict[str, Ratio | None]:
    """What a small step does: texts decoded near codes, beside those of the codes themselves.

    Returns:
        same: share of texts equal to their centre's.
        similarity: mean of 1 - normalised Levenshtein distance to it.
        valid: share that pass; None without a checker.
    """
    return {
        "same": exact_match(texts, centres),
        "similarity": edit_similarity(texts, centres),
        "valid": None if is_valid is None else Ratio([bool(is_valid(text)) for text in texts]),
    }


def explained(fitted: Property, z_ND: Tensor, values_N: np.ndarray) -> Ratio:
    """R^2, the share of the values' variance that a probe explains (Alain and Bengio, arXiv
    1610.01644): 1 - sum of (y - prediction)^2 / sum of (y - mean)^2, below 0 for one that is worse
    than the mean. Values that are not finite are left out."""
    finite_N = np.isfinite(values_N)
    y = values_N[finite_N]
    errors = (y - fitted.predict(z_ND).double().numpy()[finite_N]) ** 2
    variation = (y - y.mean()) ** 2
    return Ratio(variation - errors, variation)


def nats_per_token(nll_N: Tensor, ids: Ids) -> Ratio:
    """Teacher-forced cross-entropy: the sum over sequences divided by the sum of tokens, end
    tokens included."""
    return Ratio(nll_N.double().numpy(), list(map(len, ids)))


def participation_ratio(z_ND: Tensor) -> float:
    """(sum of l)^2 / sum of l^2 over the eigenvalues l of the codes' covariance: how many
    directions carry the variance, D for an isotropic cloud, 1 for a line, 0 for a point (Gao et
    al., bioRxiv 214262, 2017)."""
    centred_ND = z_ND.double() - z_ND.double().mean(0)
    covariance_DD = centred_ND.T @ centred_ND  # any factor cancels
    squares = covariance_DD.square().sum()
    return (covariance_DD.trace().square() / squares).item() if squares > 0 else 0.0


def mean_square_norm(z_ND: Tensor) -> float:
    """Mean of |z|^2 / D: 1 for the prior N(0, I)."""
    return z_ND.double().square().mean().item()


def active_dimensions(z_ND: Tensor, threshold: float = 0.01) -> int:
    """Coordinates whose variance over the sequences is above 0.01 (Burda, Grosse and
    Salakhutdinov, arXiv 1509.00519)."""
    return int((z_ND.double().var(0, correction=0) > threshold).sum())


def sliced_wasserstein(z_ND: Tensor, slices: int = 256, seed: int = 0) -> float:
    """Mean over random directions of the squared 2-Wasserstein distance between the codes'
    projections and N(0, 1) (Bonneel et al., J. Math. Imaging and Vision 51, 2015). Against the
    density itself, not draws of it: with x_1 <= ... <= x_N and a_i the integral of the normal
    quantile function from (i-1)/N to i/N it is mean(x^2) - 2 sum(a_i x_i) + 1. Of N draws of the
    prior it is about 2 / N or more, not 0.
    """
    generator = Generator().manual_seed(seed)
    directions_DM = torch.randn(z_ND.shape[1], slices, generator=generator, dtype=torch.float64)
    sorted_NM = (z_ND.double() @ (directions_DM / directions_DM.norm(dim=0))).sort(dim=0).values
    normal = torch.distributions.Normal(*torch.tensor([0.0, 1.0]).double())
    edges = normal.icdf(torch.linspace(0, 1, len(z_ND) + 1, dtype=torch.float64))
    density = normal.log_prob(edges).exp()
    quantiles_N = density[:-1] - density[1:]
    squared_M = sorted_NM.square().mean(0) - 2 * quantiles_N @ sorted_NM + 1
    return squared_M.mean().item()


def partners(n: int, rng: np.random.Generator) -> np.ndarray:
    """Another row for each of n rows, int64 [n]: a random cycle through all of them, so that no
    row is its own partner (n >= 2)."""
    order = rng.permutation(n)
    partner = np.empty(n, dtype=np.int64)
    partner[order] = np.roll(order, 1)
    return partner
