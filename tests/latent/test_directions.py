import pytest
import torch

from t5vae.common.errors import UserError
from t5vae.latent.directions import direction
from tests.latent.tiny import Digits

SPACE = Digits(3)


def test_a_direction_is_the_mean_difference_and_moves_by_its_strength():
    found = direction(SPACE, [("111", "131"), ("500", "520")])
    assert found.vector_D.tolist() == [0, 2, 0]
    assert found.apply(["444", "010"]) == ["464", "030"]
    assert found.apply(["444"], strength=2) == ["484"]
    assert found.apply(["444"], strength=0) == ["444"]
    assert found.apply(["444"], strength=-1) == ["424"]


@pytest.mark.parametrize(
    ("pairs", "consistency"),
    [
        ([("000", "200"), ("500", "600"), ("010", "510")], 1.0),
        ([("000", "100"), ("000", "010"), ("000", "001")], 0.0),
        ([("000", "100"), ("100", "000")], -1.0),
        ([("000", "100")], None),
    ],
)
def test_consistency_says_how_alike_the_pairs_differ(pairs, consistency):
    found = direction(SPACE, pairs).consistency
    assert found == (None if consistency is None else pytest.approx(consistency, abs=1e-6))


def test_of_pairs_that_share_nothing_only_the_mean_is_left():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 10, (200, 2, 3), generator=generator).tolist()
    pairs = [("".join(map(str, a)), "".join(map(str, b))) for a, b in ids]
    assert abs(direction(SPACE, pairs).consistency) < 0.2


def test_no_pairs_are_refused():
    with pytest.raises(UserError, match="at least one pair of texts; none given"):
        direction(SPACE, [])
