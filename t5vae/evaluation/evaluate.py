"""evaluate: every metric of a trained space in one report, with controls beside them.

Shapes: N held-out sequences, P paths, S steps of a path, D latent size.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from t5vae.common.errors import UserError
from t5vae.evaluation import metrics
from t5vae.evaluation.alarms import alarms
from t5vae.evaluation.bootstrap import Ratio, half_sampled, intervals
from t5vae.evaluation.geometry import geometry, portrait
from t5vae.evaluation.rows import Ids, Rows
from t5vae.evaluation.training import TrainingSet
from t5vae.evaluation.trigram import Trigram
from t5vae.latent import LatentSpace, checker
from t5vae.latent.checkers import Checker
from t5vae.latent.measures import Measure
from t5vae.latent.measures import measure as named_measure
from t5vae.latent.paths import path
from t5vae.latent.priors import fit_prior
from t5vae.latent.priors.normal import Normal
from t5vae.latent.properties import fit_property

SCHEMA_VERSION = 2
FIT = 10_000  # sequences of the training sample the Gaussian prior and the probe are fitted on
STEP_SIZES = {"quarter": 0.25, "half": 0.5, "one": 1.0}  # of smoothness
SHOWN, SHOWN_PATHS = 50, 10  # examples

Figures = dict[str, Any]


@torch.no_grad()
def evaluate(
    space: LatentSpace,
    *,
    valid_ids: Ids,
    training: TrainingSet,
    check: str | None = None,
    measure: str = "length",
    samples: int = 2000,
    seed: int = 0,
    interpolations: int = 100,
    steps: int = 11,
) -> dict[str, Any]:
    """Measure a space on held-out sequences and on samples of its prior.

    All decoding is greedy and free-running; teacher-forced figures are named so.

    Args:
        space: the trained model.
        valid_ids: N >= 4 held-out sequences, token ids, each ending in the end token; none of
            them should be in the training set.
        training: the training set, against which novelty is judged; a sample of it is what the
            prior, the probe and the trigram model are fitted on.
        check: a checker's name (see :func:`t5vae.latent.checker`), or None: then what needs one
            is None, and every sample counts as valid.
        measure: what the linear probe predicts and the map shows (see
            :func:`t5vae.latent.measures.measure`).
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
        - interpolation: validity, directness, largest_step, distinct, exact_ends;
        - smoothness: same, similarity and valid of the texts decoded at z + s eps, z a held-out
          code, eps a draw of N(0, I), s a `quarter`, a `half` and `one`;
        - mmd (the unbiased estimate of MMD^2 to N(0, I), kernel imq), sliced_wasserstein,
          epps_pulley_slices, epps_pulley_axes, mean_square_norm, participation_ratio,
          active_dimensions, latent_size: of the held-out codes;
        - probe: `r2` on the held-out sequences of a linear regression of `measure` on training
          codes; None where all have the same value;
        - contamination: the share of the held-out sequences that are training sequences too,
          token by token;
        - alarms: what is wrong with the space, by name (see :func:`alarms`);
        - intervals: [low, high] of 95 % under the same names, controls included: of shares and
          means by bootstrap over sequences, samples or paths, of what describes a cloud of codes
          by half samples (see :mod:`t5vae.evaluation.bootstrap`). They say what other data would
          have changed, not another training run;
        - n: how many of everything; schema_version, check, measure, seed;
        - controls: the same names, where they are defined, for `trigram` (a token trigram model),
          `shuffled` (each held-out sequence given another one's code), `endpoints` (paths that
          repeat the two true ends), `held_out` (the held-out texts as if they were samples),
          `prior` (as many true draws of N(0, I) as there are codes);
        - pictures: what the page's plots show: `by_length`, exact match by tokens; the codes'
          `eigenvalues`, `histogram`, `quantiles` and `map` (see
          :func:`t5vae.evaluation.geometry.portrait`), the latter with the `values` of `measure`;
        - examples: `reconstructions`, `samples` and `interpolations`, as texts with their marks.

        The metrics' definitions and sources are in :mod:`t5vae.evaluation.metrics`.

    Raises:
        UserError: for an unknown checker or measure, too few sequences, samples, interpolations or
            steps.
    """
    if len(valid_ids) < 4 or training.count < 2:
        raise UserError(
            f"evaluation needs at least 4 held-out and 2 training sequences; "
            f"{len(valid_ids)} and {training.count} given: build larger shards"
        )
    if samples < 1 or interpolations < 1:
        raise UserError(
            f"samples is {samples} and interpolations {interpolations}; each is at least 1"
        )
    rng = np.random.default_rng(seed)
    held_out = _HeldOut(
        space,
        valid_ids,
        others=metrics.partners(len(valid_ids), rng),
        is_valid=None if check is None else checker(check),
        rng=rng,
        generator=Generator().manual_seed(seed),
    )
    value_of = named_measure(measure)
    sample = training.sample()
    fitted_on = [sample[i] for i in rng.permutation(len(sample))[:FIT]]
    fitted_ND = space.encode_ids(fitted_on)
    prior_ND = Normal(space.latent_size).draw(len(valid_ids), held_out.generator)
    reconstruction = _reconstruction(held_out)
    draws = _draw(held_out, sample, fitted_ND, samples)
    del sample
    known = training.find([*chain(*draws.texts.values()), *held_out.texts], valid_ids)
    parts = [
        reconstruction,
        _generation(held_out, draws, known.texts),
        _interpolation(held_out, interpolations, steps),
        _smoothness(held_out),
        _Part(geometry(held_out.z_ND), {"prior": geometry(prior_ND)}, portrait(held_out.z_ND)),
        _probe(held_out, value_of, fitted_ND, space.detokenize(fitted_on)),
    ]
    controls: dict[str, Figures] = defaultdict(dict)
    for name, figures in (item for part in parts for item in part.controls.items()):
        controls[name] |= figures
    figures = _union([part.figures for part in parts]) | {"controls": dict(controls)}
    found = intervals(figures, rng) | half_sampled(geometry, held_out.z_ND, rng)
    found["controls"]["prior"] = half_sampled(geometry, prior_ND, rng)
    n = {
        "held_out": len(valid_ids),
        "held_out_tokens": sum(map(len, valid_ids)),
        "contaminated": sum(tuple(row) in known.ids for row in valid_ids),
        "samples": samples,
        "interpolations": interpolations,
        "interpolation_steps": steps,
        "fitted_on": len(fitted_on),
        "train": training.count,
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "check": check,
        "measure": measure,
        "seed": seed,
        "latent_size": space.latent_size,
        **figures,
        "contamination": n["contaminated"] / n["held_out"],
        "alarms": alarms(figures, found, n),
        "intervals": found,
        "n": n,
        "pictures": _union([part.pictures for part in parts]),
        "examples": _union([part.examples for part in parts]),
    }


@dataclass(frozen=True)
class _Part:
    """What a part of the evaluation found."""

    figures: Figures
    controls: dict[str, Figures]
    pictures: dict[str, Any] = field(default_factory=dict)
    examples: dict[str, Any] = field(default_factory=dict)


class _HeldOut:
    """The held-out sequences, and what all parts need of them.

    Attributes:
        others: int64 [N], for each sequence another one.
        texts: the sequences as strings, `decoded` what became of them.
    """

    def __init__(
        self,
        space: LatentSpace,
        ids: Ids,
        *,
        others: np.ndarray,
        is_valid: Checker | None,
        rng: np.random.Generator,
        generator: Generator,
    ):
        self.space, self.ids, self.others = space, ids, others
        self.is_valid, self.rng, self.generator = is_valid, rng, generator
        self.z_ND = space.encode_ids(ids)
        self.shuffled_ND = self.z_ND[torch.from_numpy(others)]
        self.texts = space.detokenize(ids)
        self.decoded_ids = space.decode_ids(self.z_ND)
        self.decoded = space.detokenize(self.decoded_ids)

    def decode(self, z_ND: Tensor) -> list[str]:
        return self.space.detokenize(self.space.decode_ids(z_ND))

    def marks(self, text: str) -> dict[str, Any]:
        """A text as an example, and whether it is valid; None where that is not known."""
        return {"text": text, "valid": self.is_valid and bool(self.is_valid(text))}


def _reconstruction(held_out: _HeldOut) -> _Part:
    ids, texts, decoded = held_out.ids, held_out.texts, held_out.decoded
    nll_N = held_out.space.score_ids(ids, held_out.z_ND)
    shuffled_nll_N = held_out.space.score_ids(ids, held_out.shuffled_ND)

    def figures(rows: Sequence[int]) -> Figures:
        others = [decoded[row] for row in rows]
        return {
            "exact_match": metrics.exact_match(others, texts),
            "token_accuracy": metrics.token_accuracy(
                [held_out.decoded_ids[row] for row in rows], ids
            ),
            "edit_similarity": metrics.edit_similarity(others, texts),
        }

    by_length: dict[int, list[bool]] = defaultdict(list)
    for row, text, back in zip(ids, texts, decoded, strict=True):
        by_length[len(row)].append(text == back)
    lengths = [
        {
            "tokens": tokens,
            "n": len(by_length[tokens]),
            "exact_match": Ratio(by_length[tokens]),
            "interval": Ratio(by_length[tokens]).interval(held_out.rng),
        }
        for tokens in sorted(by_length)
    ]
    shown = [
        {"text": text, "decoded": back, "exact": text == back}
        for text, back in zip(texts[:SHOWN], decoded, strict=False)
    ]
    return _Part(
        figures(range(len(ids)))
        | {
            "nats_per_token": metrics.nats_per_token(nll_N, ids),
            "shuffled_gap": metrics.nats_per_token(shuffled_nll_N - nll_N, ids),
        },
        {
            "shuffled": figures(held_out.others.tolist())
            | {"nats_per_token": metrics.nats_per_token(shuffled_nll_N, ids)}
        },
        {"by_length": lengths},
        {"reconstructions": shown},
    )


@dataclass(frozen=True)
class _Draws:
    """Generated texts.

    Attributes:
        texts: of the `normal` prior, the fitted `gaussian` and the `trigram` model.
        trigram_nats: what the trigram model gives the held-out sequences, nats a token.
    """

    texts: dict[str, list[str]]
    trigram_nats: float


def _draw(held_out: _HeldOut, sample: Rows, fitted_ND: Tensor, samples: int) -> _Draws:
    generator = held_out.generator
    normal, gaussian = Normal(held_out.space.latent_size), fit_prior("gaussian", fitted_ND)
    trigram = Trigram(sample, eos=held_out.ids[0][-1])
    imitated = trigram.sample(samples, sample.longest, held_out.rng)
    texts = {
        "normal": held_out.decode(normal.draw(samples, generator)),
        "gaussian": held_out.decode(gaussian.draw(samples, generator)),
        "trigram": held_out.space.detokenize(imitated),
    }
    return _Draws(texts, trigram.nats_per_token(held_out.ids))


def _generation(held_out: _HeldOut, draws: _Draws, known: Collection[str]) -> _Part:
    def figures(texts: Sequence[str]) -> Figures:
        return metrics.quality(texts, known, held_out.is_valid)

    of = {name: figures(texts) for name, texts in draws.texts.items()}
    shown = draws.texts["normal"][:SHOWN]
    return _Part(
        of["normal"] | {"gaussian": of["gaussian"]},
        {
            "trigram": of["trigram"] | {"nats_per_token": draws.trigram_nats},
            "held_out": figures(held_out.texts),
        },
        examples={"samples": [held_out.marks(text) | {"known": text in known} for text in shown]},
    )


def _interpolation(held_out: _HeldOut, count: int, steps: int) -> _Part:
    first = held_out.rng.integers(len(held_out.ids), size=count)
    last = held_out.others[first]
    ends = [(held_out.texts[a], held_out.texts[b]) for a, b in zip(first, last, strict=True)]
    z_PSD = path(held_out.z_ND[first], held_out.z_ND[last], steps)
    between = held_out.decode(z_PSD.flatten(0, 1))
    paths = [between[i : i + steps] for i in range(0, len(between), steps)]
    copied = [[a] * (steps - steps // 2) + [b] * (steps // 2) for a, b in ends]

    def figures(paths: list[list[str]]) -> Figures:
        return {"interpolation": metrics.interpolation(paths, held_out.is_valid, ends)}

    shown = [[held_out.marks(text) for text in texts] for texts in paths[:SHOWN_PATHS]]
    return _Part(figures(paths), {"endpoints": figures(copied)}, examples={"interpolations": shown})


def _smoothness(held_out: _HeldOut) -> _Part:
    def figures(texts: list[str]) -> Figures:
        return metrics.smoothness(texts, held_out.decoded, held_out.is_valid)

    def near(size: float) -> list[str]:
        noise_ND = torch.randn(held_out.z_ND.shape, generator=held_out.generator)
        return held_out.decode(held_out.z_ND + size * noise_ND)

    others = [held_out.decoded[row] for row in held_out.others]
    return _Part(
        {"smoothness": {name: figures(near(size)) for name, size in STEP_SIZES.items()}},
        {"shuffled": {"smoothness": figures(others)}},
    )


def _probe(
    held_out: _HeldOut, value_of: Measure, fitted_ND: Tensor, fitted_on: Sequence[str]
) -> _Part:
    values_N = np.array([value_of(text) for text in held_out.texts])
    shown = {"values": [value if np.isfinite(value) else None for value in values_N.tolist()]}
    try:
        probe = fit_property(fitted_ND, [value_of(text) for text in fitted_on])
    except UserError:  # too few of them have a value, or all the same
        return _Part({"probe": {"r2": None}}, {"shuffled": {"probe": {"r2": None}}}, shown)
    right = metrics.explained(probe, held_out.z_ND, values_N)
    wrong = metrics.explained(probe, held_out.shuffled_ND, values_N)
    return _Part({"probe": {"r2": right}}, {"shuffled": {"probe": {"r2": wrong}}}, shown)


def _union(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return reduce(dict.__or__, parts, {})
