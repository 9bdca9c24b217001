"""Optimise a property of a text: gradient ascent in the latent space, and decoding on the way.

As in Gómez-Bombarelli et al. (ACS Central Science 2018), from several codes around the start's and
within a trust region.

Shapes: N codes or texts, B starts, T tokens, D latent size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from t5vae.common.errors import UserError
from t5vae.latent.checkers import Checker
from t5vae.latent.codec import Codec, Ids
from t5vae.latent.distances import distance
from t5vae.latent.properties import Property

DECODE_EVERY = 5  # steps
SPREAD = 0.6  # distance of the starts from the text's code, in radii
STRIDE = 0.1  # the first step, in radii; later ones shorten evenly to none


@dataclass(frozen=True)
class Candidate:
    """A text, and what its own code says of it.

    Attributes:
        text: the text.
        predicted: the property at the text's code.
        value: what the function says of the text; None without one, nan where it has no value.
        nats_per_token: cross-entropy of the text under its code.
        distance: of the text's code from the start's, in standard deviations of the prior.
    """

    text: str
    predicted: float
    value: float | None
    nats_per_token: float
    distance: float


@dataclass(frozen=True)
class Optimized:
    """What an optimisation found.

    Attributes:
        start: the text it began with.
        candidates: the others, best first.
        decoded: how many codes were decoded to find them.
    """

    start: Candidate
    candidates: list[Candidate]
    decoded: int


def optimize(
    codec: Codec,
    text: str,
    property: Property,
    *,
    goal: str | float = "max",
    function: Callable[[str], float] | None = None,
    check: Checker | None = None,
    radius: float = 1.5,
    n: int = 10,
    steps: int = 40,
    starts: int = 16,
    penalty: float = 0.0,
    seed: int = 0,
) -> Optimized:
    """Search near a text for texts with more of a property, less of it, or a given value.

    Args:
        codec: the model.
        text: the start.
        property: what is optimised, as predicted from codes.
        goal: "max", "min", or the value to come close to.
        function: the true property of a text, nan where it has none: ranks the candidates.
        check: keep only candidates that it finds valid.
        radius: of the trust region, in standard deviations of the prior: no code that is visited
            is further than this from the text's. Two draws of the prior lie about 1.41 apart.
        n: how many candidates at most.
        steps: of gradient ascent.
        starts: codes near the text's that ascend together.
        penalty: what a nat per token of the decoder's uncertainty about its own greedy decoding
            costs, in standard deviations of the property. It keeps the search where the decoder is
            sure, and so near the texts it is at.
        seed: of the starts.

    Returns:
        The start and its candidates: different texts, ranked by `function` where it is given,
        else by the property at the code of the decoded text. May be none.

    Raises:
        UserError: for an unknown goal, one or a radius that is not finite, a radius that is not
            positive, or a text that is too long.
    """
    if isinstance(goal, str) and goal not in ("max", "min"):
        raise UserError(f"unknown goal {goal!r}; choose max, min or a number")
    if not (isinstance(goal, str) or math.isfinite(goal)):
        raise UserError(f"the goal of the search is {goal}; it must be finite")
    if not 0 < radius < math.inf:
        raise UserError(f"the radius of the search is {radius}; it must be above 0, and finite")
    begin_1D = codec.encode([text])
    (start,) = _candidates(codec, [text], begin_1D, property, function)
    sign = _sign(goal, start)
    visited = _ascend(codec, begin_1D, property, sign, radius, steps, starts, penalty, seed)
    texts = [found for found in dict.fromkeys(codec.detokenize(visited)) if found != text]
    if check is not None:
        texts = [found for found in texts if check(found)]
    candidates = _candidates(codec, texts, begin_1D, property, function)

    def merit(candidate: Candidate) -> float:
        value = candidate.predicted if candidate.value is None else candidate.value
        if math.isnan(value):
            return -math.inf
        return sign * value if isinstance(goal, str) else -abs(value - goal)

    candidates.sort(key=merit, reverse=True)
    return Optimized(start, candidates[:n], len(visited))


def _ascend(
    codec: Codec,
    begin_1D: Tensor,
    property: Property,
    sign: int,
    radius: float,
    steps: int,
    starts: int,
    penalty: float,
    seed: int,
) -> list[list[int]]:
    """What is decoded on the way of several starts to more (sign 1) or less: token sequences."""
    begin_1D = begin_1D.to(codec.model.device)
    furthest = radius * math.sqrt(codec.latent_size)

    def trusted(z_BD: Tensor) -> Tensor:
        if codec.model.config.normalize:  # all texts have codes of this norm
            z_BD = normalize(z_BD) * math.sqrt(codec.latent_size)
        return begin_1D + (z_BD - begin_1D).renorm(2, 0, furthest)

    generator = torch.Generator().manual_seed(seed)
    noise_BD = torch.randn(starts, codec.latent_size, generator=generator).to(begin_1D)
    z_BD = trusted(begin_1D + SPREAD * furthest * normalize(noise_BD))
    visited: list[list[int]] = []
    for step in range(steps + 1):
        if step % DECODE_EVERY == 0 or step == steps:
            ids = codec.decode_ids(z_BD)
            visited += ids
        if step == steps:
            return visited
        z_BD.requires_grad_()
        gain = sign * property.predict(z_BD).sum() / property.scale
        if penalty:
            gain = gain - penalty * _nats_per_token(codec, ids, z_BD).sum()
        (slope_BD,) = torch.autograd.grad(gain, z_BD)
        length = STRIDE * furthest * (1 - step / steps)
        z_BD = trusted(z_BD.detach() + length * normalize(slope_BD))
    return visited


def _sign(goal: str | float, start: Candidate) -> int:
    """Whether the goal asks for more (1) or less (-1) than the start has.

    Not where the predicted value would be the goal's, but beyond: texts change later than codes.
    """
    if isinstance(goal, str):
        return 1 if goal == "max" else -1
    known = start.predicted
    if start.value is not None and not math.isnan(start.value):
        known = start.value
    return 1 if goal >= known else -1


def _nats_per_token(codec: Codec, ids: Ids, z_BD: Tensor) -> Tensor:
    """Cross-entropy of each sequence under its code, float32 [B], with gradients to the codes."""
    rows = [torch.tensor(row) for row in ids]
    ids_BT = pad_sequence(rows, batch_first=True, padding_value=codec.model.pad).to(z_BD.device)
    lengths_B = torch.tensor([len(row) for row in ids], device=z_BD.device)
    scored = codec.model(input_ids=ids_BT, latent=z_BD.to(codec.model.dtype), mode="score")
    return scored.nll / lengths_B


def _candidates(
    codec: Codec,
    texts: Sequence[str],
    begin_1D: Tensor,
    property: Property,
    function: Callable[[str], float] | None,
) -> list[Candidate]:
    """Candidates of texts, in order; distances are from the start. Those too long are left out."""
    # A decoded text may be split into other, and more, tokens than it was decoded from.
    fitting = [
        (text, row)
        for text, row in zip(texts, codec.token_ids(texts), strict=True)
        if codec.fits(row)
    ]
    ids = [row for _, row in fitting]
    z_ND = codec.encode_ids(ids)
    lengths_N = torch.tensor([len(row) for row in ids])
    nats_N = codec.score_ids(ids, z_ND) / lengths_N
    columns = (property.predict(z_ND), nats_N, distance(z_ND, begin_1D))
    return [
        Candidate(text, predicted, function(text) if function else None, nats, away)
        for (text, _), predicted, nats, away in zip(
            fitting, *(column.tolist() for column in columns), strict=True
        )
    ]
