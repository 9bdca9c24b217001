"""evaluate: every metric of a trained space in one report, with controls beside them.

Shapes: N held-out sequences, P paths, S steps of a path, D latent size.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Generator, Tensor

from shards.errors import UserError
from t5vae.evaluation import metrics
from t5vae.evaluation.trigram import Trigram
from t5vae.latent import LatentSpace, checker
from t5vae.latent.paths import path
from t5vae.latent.priors import Normal, fit_prior
from t5vae.objective import mmd, sliced_epps_pulley

SCHEMA_VERSION = 1
FIT = 10_000  # training sequences the Gaussian prior is fitted on

Ids = Sequence[Sequence[int]]


@torch.no_grad()
def evaluate(
    space: LatentSpace,
    *,
    valid_ids: Ids,
    train_texts: Sequence[str],
    train_ids: Ids,
    check: str | None = None,
    samples: int = 2000,
    seed: int = 0,
    interpolations: int = 100,
    steps: int = 11,
) -> dict[str, Any]:
    """Measure a space on held-out sequences and on samples of its prior.

    All decoding is greedy and free-running; teacher-forced figures are named so.

    Args:
        space: the trained model.
        valid_ids: N >= 2 held-out sequences, token ids, each ending in the end token; none of
            them in the training set.
        train_texts: the training set, against which novelty is judged.
        train_ids: training sequences as token ids, for the fitted prior and the trigram model.
        check: a checker's name (see :func:`t5vae.latent.checker`), or None: then what needs one
            is None, and every sample counts as valid.
        samples: draws from each prior, and from the trigram model.
        seed: of every draw.
        interpolations: P, straight paths between random pairs of held-out sequences.
        steps: S, decoded codes of a path, both ends included.

    Returns:
        A dictionary fit for JSON, the content of `eval.json`:

        - exact_match, token_accuracy, edit_similarity: of the held-out reconstructions;
        - nats_per_token: their teacher-forced cross-entropy, and shuffled_gap: how much it rises
          when every sequence is given another one's code. Near 0 the decoder ignores the code:
          posterior collapse;
        - valid, unique, novel, valid_unique_novel: of the draws from N(0, I), and under
          `gaussian` from a normal distribution fitted on training codes;
        - interpolation: validity, directness, distinct;
        - mmd (the unbiased estimate of MMD^2 to N(0, I), kernel imq), epps_pulley_slices,
          epps_pulley_axes, mean_square_norm, participation_ratio, active_dimensions, latent_size:
          of the held-out codes;
        - n: how many of everything; schema_version, check, seed;
        - controls: the same names, where they are defined, for `trigram` (a token trigram model),
          `shuffled` (each held-out sequence given another one's code), `endpoints` (paths that
          repeat the two true ends), `held_out` (the held-out texts as if they were samples),
          `prior` (as many true draws of N(0, I) as there are codes).

        The metrics' definitions and sources are in :mod:`t5vae.evaluation.metrics`.

    Raises:
        UserError: for an unknown checker, too few sequences, samples, interpolations or steps.
    """
    if len(valid_ids) < 2 or len(train_ids) < 2:
        raise UserError(
            f"evaluation needs at least 2 held-out and 2 training sequences; "
            f"{len(valid_ids)} and {len(train_ids)} given: build larger shards"
        )
    if samples < 1 or interpolations < 1:
        raise UserError(
            f"samples is {samples} and interpolations {interpolations}; each is at least 1"
        )
    is_valid = None if check is None else checker(check)
    known = frozenset(train_texts)
    rng = np.random.default_rng(seed)
    generator = Generator().manual_seed(seed)

    z_ND = space.encode_ids(valid_ids)
    others = metrics.partners(len(valid_ids), rng)
    shuffled_ND = z_ND[torch.from_numpy(others)]
    references = space.detokenize(valid_ids)
    decoded_ids = space.decode_ids(z_ND)
    nats = metrics.nats_per_token(space.score_ids(valid_ids, z_ND), valid_ids)
    shuffled_nats = metrics.nats_per_token(space.score_ids(valid_ids, shuffled_ND), valid_ids)

    def reconstruction(ids: Ids) -> dict[str, float]:
        texts = space.detokenize(ids)
        return {
            "exact_match": metrics.exact_match(texts, references),
            "token_accuracy": metrics.token_accuracy(ids, valid_ids),
            "edit_similarity": metrics.edit_similarity(texts, references),
        }

    def generation(ids: Ids) -> dict[str, float | None]:
        return metrics.quality(space.detokenize(ids), known, is_valid)

    rows = rng.choice(len(train_ids), min(FIT, len(train_ids)), replace=False)
    gaussian = fit_prior("gaussian", space.encode_ids([train_ids[row] for row in rows]))
    normal = Normal(space.latent_size)

    first = rng.integers(len(valid_ids), size=interpolations)
    last = others[first]
    z_PSD = path(z_ND[torch.from_numpy(first)], z_ND[torch.from_numpy(last)], steps)
    between = space.detokenize(space.decode_ids(z_PSD.flatten(0, 1)))
    paths = [between[i : i + steps] for i in range(0, len(between), steps)]
    copied = [
        [references[a]] * (steps - steps // 2) + [references[b]] * (steps // 2)
        for a, b in zip(first, last, strict=True)
    ]

    trigram = Trigram(train_ids, eos=valid_ids[0][-1])
    longest = max(map(len, train_ids))

    return {
        "schema_version": SCHEMA_VERSION,
        "check": check,
        "seed": seed,
        **reconstruction(decoded_ids),
        "nats_per_token": nats,
        "shuffled_gap": shuffled_nats - nats,
        **generation(space.decode_ids(normal.draw(samples, generator))),
        "gaussian": generation(space.decode_ids(gaussian.draw(samples, generator))),
        "interpolation": metrics.interpolation(paths, is_valid),
        **geometry(z_ND),
        "latent_size": space.latent_size,
        "n": {
            "held_out": len(valid_ids),
            "held_out_tokens": sum(map(len, valid_ids)),
            "samples": samples,
            "interpolations": interpolations,
            "interpolation_steps": steps,
            "gaussian_fit": len(rows),
            "train": len(train_ids),
        },
        "controls": {
            "trigram": {
                **generation(trigram.sample(samples, longest, rng)),
                "nats_per_token": trigram.nats_per_token(valid_ids),
            },
            "shuffled": {
                **reconstruction([decoded_ids[row] for row in others]),
                "nats_per_token": shuffled_nats,
            },
            "endpoints": {"interpolation": metrics.interpolation(copied, is_valid)},
            "held_out": metrics.quality(references, known, is_valid),
            "prior": geometry(normal.draw(len(z_ND), generator)),
        },
    }


def geometry(z_ND: Tensor) -> dict[str, float]:
    """How codes [N, D] lie, beside N(0, I); see `evaluate`."""
    return {
        "mmd": mmd(z_ND, kernel="imq", prior="normal", estimator="u").item(),
        "epps_pulley_slices": sliced_epps_pulley(z_ND, axes=False).item(),
        "epps_pulley_axes": sliced_epps_pulley(z_ND, slices=0).item(),
        "mean_square_norm": metrics.mean_square_norm(z_ND),
        "participation_ratio": metrics.participation_ratio(z_ND),
        "active_dimensions": metrics.active_dimensions(z_ND),
    }


# Name in the report, the control beside it, what it says.
ROWS = [
    ("exact_match", "shuffled", "held-out sequences that come back exactly"),
    ("token_accuracy", "shuffled", "tokens that come back at their place"),
    ("edit_similarity", "shuffled", "1 - edit distance / length"),
    ("nats_per_token", "trigram", "teacher-forced cross-entropy; lower is better"),
    ("shuffled_gap", None, "what a wrong code costs, nats a token; near 0: the code is ignored"),
    ("valid", "trigram", "draws from N(0, I) that pass the check"),
    ("unique", "trigram", "distinct ones among the valid"),
    ("novel", "trigram", "of these, not in the training set"),
    ("valid_unique_novel", "trigram", "the three multiplied"),
    ("gaussian.valid", "trigram", "draws from a fitted Gaussian that pass the check"),
    ("gaussian.valid_unique_novel", "trigram", "the same, distinct and new"),
    ("interpolation.validity", "endpoints", "steps between two held-out texts that pass"),
    ("interpolation.directness", "endpoints", "1: no detour from one end to the other"),
    ("interpolation.distinct", "endpoints", "distinct texts on a path"),
    ("mmd", "prior", "MMD^2 between codes and N(0, I)"),
    ("epps_pulley_slices", "prior", "distance from N(0, 1) on random directions"),
    ("epps_pulley_axes", "prior", "the same on each coordinate"),
    ("mean_square_norm", "prior", "|z|^2 / D"),
    ("participation_ratio", "prior", "directions that carry the variance"),
    ("active_dimensions", "prior", "coordinates that vary at all"),
]


def table(report: dict[str, Any]) -> Table:
    """The report for people: metric, model, the control beside it, what it means.

    Args:
        report: what `evaluate` returned, or `eval.json` read back.
    """
    n = report["n"]
    grid = Table(
        title=f"{n['held_out']:,} held-out sequences, {n['samples']:,} samples, "
        f"{n['interpolations']:,} interpolations; check: {report['check'] or 'none'}",
        title_justify="left",
    )
    grid.add_column("metric", no_wrap=True)
    grid.add_column("model", justify="right", no_wrap=True)
    grid.add_column("control", justify="right", no_wrap=True)
    grid.add_column("meaning")
    for name, control, meaning in ROWS:
        beside = ""
        if control is not None:
            # A draw is a draw: the trigram model's figures stand beside every prior's.
            counterpart = name.removeprefix("gaussian.")
            beside = f"{control} {_figure(_look_up(report['controls'][control], counterpart))}"
        grid.add_row(name.replace("_", " "), _figure(_look_up(report, name)), beside, meaning)
    return grid


def _look_up(report: dict[str, Any], name: str) -> float | int | None:
    value: Any = report
    for key in name.split("."):
        value = value[key]
    return value


def _figure(value: float | int | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.5f}" if abs(value) < 0.01 and value else f"{value:.3f}"
