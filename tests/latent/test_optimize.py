import math

import pytest
import torch

from shards.format.tokenizers import load_tokenizer
from t5vae.common.errors import UserError
from t5vae.latent.codec import Codec
from t5vae.latent.distances import distance
from t5vae.latent.optimize import _nats_per_token, optimize
from t5vae.latent.properties import Property
from t5vae.model import T5VAE
from tests.latent.tiny import random_model

D = 6
DIRECTION = torch.nn.functional.normalize(torch.tensor([1.0, -2.0, 0.0, 3.0, 1.0, 1.0]), dim=0)
PROPERTY = Property("p", "ridge", 1.0, 100, 2.0, ((DIRECTION[None], torch.tensor([0.5])),))


class Recording(Codec):
    """A codec that notes which codes it decodes."""

    def decode_ids(self, z_ND, *args, **kwargs):
        self.decoded.append(z_ND.clone())
        return super().decode_ids(z_ND, *args, **kwargs)

    @property
    def visited(self):
        return torch.cat(self.decoded)


@pytest.fixture(scope="module")
def model():
    tokenizer = load_tokenizer("byte")
    model = random_model(len(tokenizer), sequence_length=12)
    with torch.no_grad():  # as drawn, it says much the same whatever the code
        for name, parameter in model.t5.decoder.named_parameters():
            if "EncDecAttention" in name:
                parameter.mul_(10)
    return model, tokenizer


@pytest.fixture
def codec(model):
    codec = Recording(*model)
    codec.decoded = []
    return codec


@pytest.mark.parametrize("radius", [0.3, 3.0])
@pytest.mark.parametrize(("goal", "sign"), [("max", 1), ("min", -1)])
def test_the_search_ends_at_the_boundary_in_the_best_direction(codec, radius, goal, sign):
    optimize(codec, "ab", PROPERTY, goal=goal, radius=radius, penalty=0)
    start_1D = codec.encode(["ab"])
    best_D = start_1D[0] + sign * radius * D**0.5 * DIRECTION
    last_BD = codec.decoded[-1]
    expected_B = PROPERTY.predict(best_D[None]).expand(len(last_BD))
    torch.testing.assert_close(
        PROPERTY.predict(last_BD), expected_B, atol=0.05 * radius * D**0.5, rtol=0
    )


@pytest.mark.parametrize("penalty", [0.0, 10.0])
def test_no_code_outside_the_trust_region_is_visited(codec, penalty):
    found = optimize(codec, "ab", PROPERTY, radius=0.5, penalty=penalty)
    away_N = distance(codec.visited, codec.encode(["ab"]))
    assert found.decoded == len(away_N)
    assert away_N.max() <= 0.5 + 1e-5


def test_codes_of_a_normalised_model_stay_near_its_sphere(codec, monkeypatch):
    monkeypatch.setattr(codec.model.config, "normalize", True)
    optimize(codec, "ab", PROPERTY, radius=0.5)
    begin_1D = codec.encode(["ab"])
    assert distance(codec.visited, begin_1D).max() <= 0.5 + 1e-5
    # A chord of the trust region's length leaves the sphere by this much at most.
    lowest = (D * (1 - 0.5**2 / 4)) ** 0.5
    norms_N = codec.visited.norm(dim=1)
    assert lowest - 1e-4 <= norms_N.min() <= norms_N.max() <= D**0.5 + 1e-4


def test_a_number_as_goal_is_approached_from_its_side_and_passed(codec):
    here = PROPERTY.predict(codec.encode(["ab"])).item()
    sides = [
        (here + 0.5, None, 1),
        (here - 0.5, None, -1),
        (50.0, lambda text: 100.0, -1),  # what the function says counts
        (-50.0, lambda text: -100.0, 1),
        (here + 0.5, lambda text: math.nan, 1),  # unless it says nothing
    ]
    for goal, function, sign in sides:
        codec.decoded.clear()
        found = optimize(codec, "ab", PROPERTY, goal=goal, function=function, radius=2.0, n=99)
        assert (sign * (PROPERTY.predict(codec.decoded[-1]) - here)).min() > 0.5
    found = optimize(codec, "ab", PROPERTY, goal=here + 0.5, radius=2.0, n=99)
    close = [abs(candidate.predicted - here - 0.5) for candidate in found.candidates]
    assert close == sorted(close)
    assert len(close) > 3


def test_the_penalty_moves_codes_to_where_the_decoder_is_sure(codec):
    nats = []
    for penalty in (0.0, 1e4):
        optimize(codec, "ab", PROPERTY, radius=0.5, penalty=penalty)
        last_BD = codec.decoded[-1]
        with torch.no_grad():
            ids = codec.decode_ids(last_BD)
            nats.append(_nats_per_token(codec, ids, last_BD).mean().item())
    assert nats[1] < nats[0] - 0.05


def test_the_uncertainty_s_gradient_agrees_with_finite_differences(codec):
    ids = codec.tokenize(["ab", "c"])
    z_BD = codec.encode_ids(ids).requires_grad_()
    (slope_BD,) = torch.autograd.grad(_nats_per_token(codec, ids, z_BD).sum(), z_BD)
    step = 1e-3
    for d in range(D):
        shift_D = step * torch.eye(D)[d]
        with torch.no_grad():
            above_B = _nats_per_token(codec, ids, z_BD + shift_D)
            below_B = _nats_per_token(codec, ids, z_BD - shift_D)
        expected_B = (above_B - below_B) / (2 * step)
        torch.testing.assert_close(slope_BD[:, d], expected_B, atol=2e-3, rtol=2e-2)


def test_candidates_say_what_their_own_codes_say(codec):
    found = optimize(codec, "ab", PROPERTY, radius=2.0, n=1000)
    texts = [candidate.text for candidate in found.candidates]
    assert len(texts) == len(set(texts)) > 3
    assert "ab" not in texts
    assert (found.start.text, found.start.distance) == ("ab", 0.0)
    start_1D = codec.encode(["ab"])
    for candidate in [found.start, *found.candidates]:
        ids = codec.tokenize([candidate.text])
        z_1D = codec.encode_ids(ids)
        nats = codec.score_ids(ids, z_1D).item() / len(ids[0])
        away = (z_1D - start_1D).norm().item() / D**0.5
        assert candidate.predicted == pytest.approx(PROPERTY.predict(z_1D).item(), abs=1e-4)
        assert candidate.nats_per_token == pytest.approx(nats, abs=1e-4)
        assert candidate.distance == pytest.approx(away, abs=1e-4)
        assert candidate.value is None
    predicted = [candidate.predicted for candidate in found.candidates]
    assert predicted == sorted(predicted, reverse=True)
    few = optimize(codec, "ab", PROPERTY, radius=2.0, n=2)
    assert few.candidates == found.candidates[:2]


def test_a_function_ranks_the_candidates_and_those_without_a_value_come_last(codec):
    def value(text):
        return math.nan if len(text.encode()) % 2 else float(sum(text.encode()))

    for goal, key in (
        ("max", lambda v: -v),
        ("min", lambda v: v),
        (500.0, lambda v: (v - 500) ** 2),
    ):
        found = optimize(codec, "ab", PROPERTY, goal=goal, function=value, radius=2.0, n=1000)
        values = [candidate.value for candidate in found.candidates]
        known = [v for v in values if not math.isnan(v)]
        assert 1 < len(known) < len(values)
        assert values[: len(known)] == known == sorted(known, key=key)
        assert found.start.value == value("ab")


def test_a_check_keeps_what_it_finds_valid(codec):
    everything = optimize(codec, "ab", PROPERTY, radius=2.0, n=1000)
    kept = [c for c in everything.candidates if c.text < "m"]
    assert 0 < len(kept) < len(everything.candidates)
    found = optimize(codec, "ab", PROPERTY, check=lambda text: text < "m", radius=2.0, n=1000)
    assert [c.text for c in found.candidates] == [c.text for c in kept]
    nothing = optimize(codec, "ab", PROPERTY, check=lambda text: False)
    assert nothing.candidates == []
    assert nothing.start.text == "ab"


def test_texts_that_became_too_long_are_left_out(codec, monkeypatch):
    long = "x" * 50
    monkeypatch.setattr(codec, "detokenize", lambda ids: [long, "ok"])
    found = optimize(codec, "ab", PROPERTY)
    assert [candidate.text for candidate in found.candidates] == ["ok"]


def test_a_search_repeats_by_seed_and_leaves_no_trace(codec):
    state = torch.get_rng_state()
    first = optimize(codec, "ab", PROPERTY, radius=2.0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert optimize(codec, "ab", PROPERTY, radius=2.0) == first
    assert optimize(codec, "ab", PROPERTY, radius=2.0, seed=1) != first
    assert all(parameter.grad is None for parameter in codec.model.parameters())


def test_a_model_in_bfloat16_is_searched_too(model):
    network, tokenizer = model
    half = T5VAE(network.config).to(torch.bfloat16)
    found = optimize(Codec(half, tokenizer), "ab", PROPERTY)
    assert math.isfinite(found.start.predicted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"goal": "most"}, "unknown goal 'most'; choose max, min or a number"),
        ({"goal": math.inf}, "goal of the search is inf; it must be finite"),
        ({"radius": math.inf}, "radius of the search is inf"),
        ({"radius": 0.0}, "radius of the search is 0.0; it must be above 0"),
        ({"text": "x" * 50}, "has 51 tokens"),
    ],
)
def test_a_wrong_search_is_one_line(codec, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        optimize(codec, arguments.pop("text", "ab"), PROPERTY, **arguments)
    assert "\n" not in str(caught.value)
