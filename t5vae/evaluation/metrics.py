"""The metrics, as pure functions of strings, token ids and codes; definitions and sources inside.

Shapes: N sequences, D latent size.
"""

from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from statistics import fmean

import numpy as np
from rapidfuzz.distance import Levenshtein
from torch import Tensor

Ids = Sequence[Sequence[int]]


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions equal to their reference, character by character."""
    return fmean(p == r for p, r in zip(predictions, references, strict=True))


def token_accuracy(predictions: Ids, references: Ids) -> float:
    """Share of the references' tokens, end tokens included, that the prediction has at the same
    position. On free-running output one token too many early on makes all later ones wrong."""
    hits = sum(
        token == wanted
        for prediction, reference in zip(predictions, references, strict=True)
        for token, wanted in zip(prediction, reference, strict=False)
    )
    return int(hits) / sum(map(len, references))


def edit_similarity(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean of 1 - d / max(length), d the Levenshtein distance in characters; two empty strings
    count as 1."""
    return fmean(
        Levenshtein.normalized_similarity(p, r)
        for p, r in zip(predictions, references, strict=True)
    )


def quality(
    samples: Sequence[str], known: Collection[str], is_valid: Callable[[str], bool] | None
) -> dict[str, float | None]:
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
        A share of nothing is 0.
    """
    passed = [text for text in samples if is_valid is None or is_valid(text)]
    distinct = set(passed)
    novel = [text for text in distinct if text not in known]
    return {
        "valid": None if is_valid is None else _share(passed, samples),
        "unique": _share(distinct, passed),
        "novel": _share(novel, distinct),
        "valid_unique_novel": _share(novel, samples),
    }


def _share(part: Collection, whole: Collection) -> float:
    return len(part) / len(whole) if whole else 0.0


def interpolation(
    paths: Sequence[Sequence[str]], is_valid: Callable[[str], bool] | None
) -> dict[str, float | None]:
    """How good the strings on the way between two are.

    Args:
        paths: strings of each path in order, both ends included.
        is_valid: a checker, or None.

    Returns:
        validity: share of all steps that pass; None without a checker.
        directness: mean over paths of d(first, last) / sum of d(step, next step), d the
            Levenshtein distance in characters. 1 is a path without detour; a jump from end to end
            is one too, so read it with `distinct`. Paths that never change are left out; None if
            there is no other.
        distinct: mean number of distinct strings on a path.
    """
    ratios = []
    for texts in paths:
        length = sum(Levenshtein.distance(a, b) for a, b in pairwise(texts))
        if length:
            ratios.append(Levenshtein.distance(texts[0], texts[-1]) / length)
    steps = [text for texts in paths for text in texts]
    return {
        "validity": None if is_valid is None else fmean(map(is_valid, steps)),
        "directness": fmean(ratios) if ratios else None,
        "distinct": fmean(len(set(texts)) for texts in paths),
    }


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


def nats_per_token(nll_N: Tensor, ids: Ids) -> float:
    """Teacher-forced cross-entropy: the sum over sequences divided by the sum of tokens, end
    tokens included."""
    return nll_N.double().sum().item() / sum(map(len, ids))


def partners(n: int, rng: np.random.Generator) -> np.ndarray:
    """Another row for each of n rows, int64 [n]: a random cycle through all of them, so that no
    row is its own partner (n >= 2)."""
    order = rng.permutation(n)
    partner = np.empty(n, dtype=np.int64)
    partner[order] = np.roll(order, 1)
    return partner
