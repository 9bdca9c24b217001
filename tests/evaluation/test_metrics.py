import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from t5vae.evaluation import metrics
from t5vae.latent.properties import fit_property


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
    ends = [("1", "123"), ("1", "13"), ("7", "7")]
    assert metrics.interpolation([straight], str.isdigit) == {
        "validity": 1,
        "directness": 1,
        "largest_step": 1 / 2,
        "distinct": 3,
    }
    assert metrics.interpolation([straight, wandering, still], str.isdigit, ends) == {
        "validity": 8 / 9,
        "directness": pytest.approx((1 + 1 / 6) / 2),
        "largest_step": 1 / 2,
        "distinct": 7 / 3,
        "exact_ends": 2 / 3,
    }
    assert metrics.interpolation([still], None) == {
        "validity": None,
        "directness": None,
        "largest_step": None,
        "distinct": 1,
    }


def test_the_largest_step_tells_a_jump_from_a_walk():
    jump, walk = ["aaaa", "aaaa", "bbbb"], ["aaaa", "aabb", "bbbb"]
    assert metrics.interpolation([jump], None)["largest_step"] == 1
    assert metrics.interpolation([walk], None)["largest_step"] == 0.5
    assert metrics.interpolation([jump], None)["directness"] == 1  # which directness does not


def test_smoothness_compares_texts_with_those_of_their_centres():
    assert metrics.smoothness(["12", "13", "zz"], ["12", "12", "12"], str.isdigit) == {
        "same": 1 / 3,
        "similarity": pytest.approx((1 + 1 / 2 + 0) / 3),
        "valid": 2 / 3,
    }
    assert metrics.smoothness(["a"], ["a"], None)["valid"] is None


def test_a_probe_explains_what_is_linear_in_the_code_and_nothing_else():
    rng = np.random.default_rng(0)
    z_ND = torch.from_numpy(rng.normal(size=(4000, 3))).float()
    noise_N = rng.normal(size=4000)
    linear_N = z_ND[:, 0].numpy() + noise_N
    fitted = fit_property(z_ND[:2000], linear_N[:2000])
    assert metrics.explained(fitted, z_ND[2000:], linear_N[2000:]) == pytest.approx(0.5, abs=0.05)
    holes_N = np.where(np.arange(2000) % 2, np.nan, linear_N[2000:])
    assert metrics.explained(fitted, z_ND[2000:], holes_N) == pytest.approx(0.5, abs=0.08)
    unrelated = fit_property(z_ND[:2000], noise_N[:2000])
    assert metrics.explained(unrelated, z_ND[2000:], noise_N[2000:]) == pytest.approx(0, abs=0.01)


def test_sliced_wasserstein_against_closed_forms():
    generator = torch.Generator().manual_seed(0)
    z_ND = torch.randn(4000, 6, generator=generator)
    own = metrics.sliced_wasserstein(z_ND)
    assert 0 < own < 0.01
    # W2^2 of N(0, s^2) and N(0, 1) is (s - 1)^2, of N(m, 1) and N(0, 1) it is m^2.
    assert metrics.sliced_wasserstein(3 * z_ND) == pytest.approx(4, rel=0.05)
    assert metrics.sliced_wasserstein(torch.zeros(4000, 6)) == pytest.approx(1)
    mean_D = torch.full((6,), 2.0)  # |mean|^2 / D = 4 on average over directions
    shifted = metrics.sliced_wasserstein(z_ND + mean_D, slices=4000)
    assert shifted == pytest.approx(4, rel=0.05)
    point = metrics.sliced_wasserstein(torch.zeros(1, 6))
    assert point == pytest.approx(1)


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
