import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from t5vae.evaluation import metrics


def test_exact_match_and_edit_similarity():
    references = ["kitten", "", "abc", "abc"]
    assert metrics.exact_match(["sitting", "", "abc", ""], references) == 0.5
    similarities = [1 - 3 / 7, 1.0, 1.0, 0.0]  # kitten -> sitting: 3 edits, 7 characters
    assert metrics.edit_similarity(["sitting", "", "abc", ""], references) == pytest.approx(
        sum(similarities) / 4
    )


def plain_levenshtein(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


@given(st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_edit_similarity_is_one_minus_the_normalised_distance(a, b):
    expected = 1 - plain_levenshtein(a, b) / max(len(a), len(b), 1)
    assert metrics.edit_similarity([a], [b]) == pytest.approx(expected)


def test_token_accuracy_counts_the_references_tokens_by_position():
    references = [[5, 6, 7, 1], [5, 1]]
    assert metrics.token_accuracy(references, references) == 1
    assert metrics.token_accuracy([[5, 7, 7, 1], [1]], references) == 3 / 6
    assert metrics.token_accuracy([[9, 5, 6, 7, 1], [5, 1, 1]], references) == 2 / 6


def test_quality_follows_the_definitions_of_moses():
    samples = ["12", "12", "3", "x", "45", ""]
    assert metrics.quality(samples, {"3"}, str.isdigit) == {
        "valid": 4 / 6,
        "unique": 3 / 4,
        "novel": 2 / 3,
        "valid_unique_novel": pytest.approx(4 / 6 * 3 / 4 * 2 / 3),
    }


def test_quality_of_nothing_valid_is_zero():
    nothing = metrics.quality(["x", "y"], set(), str.isdigit)
    assert set(nothing.values()) == {0.0}


def test_quality_without_a_checker_takes_all_for_valid():
    result = metrics.quality(["a", "a", "b", "c"], {"a"}, None)
    assert result == {
        "valid": None,
        "unique": 3 / 4,
        "novel": pytest.approx(2 / 3),
        "valid_unique_novel": 0.5,
    }


def test_interpolation_of_a_straight_a_wandering_and_a_still_path():
    straight, wandering, still = ["1", "12", "123"], ["1", "xyz", "12"], ["7", "7", "7"]
    assert metrics.interpolation([straight], str.isdigit) == {
        "validity": 1,
        "directness": 1,
        "distinct": 3,
    }
    assert metrics.interpolation([straight, wandering, still], str.isdigit) == {
        "validity": 8 / 9,
        "directness": pytest.approx((1 + 1 / 6) / 2),
        "distinct": 7 / 3,
    }
    assert metrics.interpolation([still], None) == {
        "validity": None,
        "directness": None,
        "distinct": 1,
    }


def test_participation_ratio_counts_directions():
    generator = torch.Generator().manual_seed(0)
    z_ND = torch.randn(50_000, 8, generator=generator)
    assert metrics.participation_ratio(z_ND) == pytest.approx(8, rel=0.01)
    z_ND[:, 3:] = 0
    assert metrics.participation_ratio(5 + 0.1 * z_ND) == pytest.approx(3, rel=0.01)
    line_ND = z_ND[:, :1] * torch.arange(8.0)
    assert metrics.participation_ratio(line_ND) == pytest.approx(1)
    assert metrics.participation_ratio(torch.ones(10, 8)) == 0
    assert metrics.active_dimensions(z_ND) == 3
    assert metrics.mean_square_norm(z_ND) == pytest.approx(3 / 8, rel=0.02)


def test_nats_per_token_weighs_tokens_not_sequences():
    assert metrics.nats_per_token(torch.tensor([3.0, 1.0]), [[5, 6, 1], [1]]) == 1


@pytest.mark.parametrize("n", [2, 3, 100])
def test_partners_are_others_and_each_is_used_once(n):
    partners = metrics.partners(n, np.random.default_rng(0))
    assert (partners != np.arange(n)).all()
    assert sorted(partners) == list(range(n))
