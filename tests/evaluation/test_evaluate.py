import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from shards.format.tokenizers import train_tokenizer
from t5vae.common.errors import UserError
from t5vae.evaluation import GivenTraining, evaluate, table
from t5vae.latent import LatentSpace
from t5vae.model import T5VAE, T5VAEConfig

T = 8
RNG = np.random.default_rng(0)
TRAIN = [[*RNG.integers(2, 12, RNG.integers(1, T)).tolist(), 1] for _ in range(400)]
HELD_OUT = [row for row in TRAIN[:100] if len(row) > 4]
TRAIN = [row for row in TRAIN[100:] if row not in HELD_OUT]


class Copy:
    """Digits as tokens 2 to 11, and codes that are the sequences themselves: nothing is lost."""

    latent_size = T

    def detokenize(self, ids):
        return ["".join(str(token - 2) for token in row if token > 1) for row in ids]

    def encode_ids(self, ids):
        return torch.tensor([[*row, *[0] * (T - len(row))] for row in ids]).float() / 4 - 1

    def decode_ids(self, z_ND):
        rows = (4 * z_ND + 4).round().clamp(1, 11).int().tolist()
        return [[*row, 1][: [*row, 1].index(1) + 1] for row in rows]

    def score_ids(self, ids, z_ND):
        return (self.encode_ids(ids) != z_ND).any(1).float() * 8


class Collapsed(Copy):
    """Decodes everything to one sequence, whatever the code."""

    def encode_ids(self, ids):
        return torch.zeros(len(ids), T)

    def decode_ids(self, z_ND):
        return [[3, 4, 1]] * len(z_ND)

    def score_ids(self, ids, z_ND):
        return torch.tensor([2.0 * len(row) for row in ids])


class Memoriser(Copy):
    """Knows the training set by heart and answers with its nearest member."""

    def decode_ids(self, z_ND):
        nearest = torch.cdist(z_ND, self.encode_ids(TRAIN)).argmin(1)
        return [TRAIN[i] for i in nearest.tolist()]


def given(space, ids):
    return GivenTraining(ids, space.detokenize(ids))


def report_of(space, **options):
    usual = {
        "valid_ids": HELD_OUT,
        "training": given(space, TRAIN),
        "check": "regex:[0-9]+",
        "samples": 300,
        "interpolations": 20,
    }
    return evaluate(space, **(usual | options))


def test_a_perfect_copy_model():
    report = report_of(Copy())
    for name in ("exact_match", "token_accuracy", "edit_similarity"):
        assert report[name] == 1
    assert report["nats_per_token"] == 0
    assert report["shuffled_gap"] > 1
    assert report["novel"] > 0.8
    assert report["controls"]["shuffled"]["exact_match"] < 0.05
    assert report["controls"]["held_out"]["valid"] == 1
    assert report["controls"]["held_out"]["novel"] == 1
    assert report["interpolation"]["validity"] == 1
    assert report["interpolation"]["distinct"] > 3
    assert report["controls"]["endpoints"]["interpolation"] == {
        "validity": 1,
        "directness": 1,
        "largest_step": 1,
        "distinct": pytest.approx(2, abs=0.1),
        "exact_ends": 1,
    }
    assert report["interpolation"]["exact_ends"] == 1
    assert report["interpolation"]["largest_step"] < 0.7
    assert 1 > report["smoothness"]["quarter"]["similarity"] > 0.3
    assert report["smoothness"]["one"]["similarity"] < report["smoothness"]["half"]["similarity"]
    assert report["controls"]["shuffled"]["smoothness"]["same"] < 0.05
    assert report["probe"]["r2"] > 0.3 > report["controls"]["shuffled"]["probe"]["r2"]
    assert "latent_use" not in report["alarms"]
    assert "novelty" not in report["alarms"]
    low, high = report["intervals"]["novel"]
    assert low < report["novel"] < high


def test_a_collapsed_model_fails_the_latent_use_alarm():
    report = report_of(Collapsed())
    assert "posterior collapse" in report["alarms"]["latent_use"]
    assert report["shuffled_gap"] == 0
    assert report["smoothness"]["one"]["same"] == 1  # smooth, since all is the same
    assert report["probe"]["r2"] <= 0
    assert report["valid"] == 1
    assert report["unique"] == pytest.approx(1 / 300)
    assert report["participation_ratio"] == 0
    assert report["active_dimensions"] == 0
    assert report["mmd"] > 0.1 > abs(report["controls"]["prior"]["mmd"])
    assert report["interpolation"]["directness"] is None
    assert report["controls"]["shuffled"]["token_accuracy"] == report["token_accuracy"]


@pytest.mark.parametrize("known", [0, 1, 30])
def test_held_out_sequences_of_the_training_set_are_counted_and_told(known):
    first = HELD_OUT[0]
    others = [[*first[:-1], 5, 1], first[1:], first[:-1]]  # longer, shorter, without its end
    report = report_of(Copy(), training=given(Copy(), [*TRAIN, *others, *HELD_OUT[:known]]))
    assert report["n"]["contaminated"] == known
    assert report["contamination"] == known / len(HELD_OUT)
    if known:
        told = report["alarms"]["contamination"]
        assert told.startswith(f"{known} of {len(HELD_OUT)} held-out sequences")
        assert "build the shards again" in told
    else:
        assert "contamination" not in report["alarms"]


def test_a_held_out_sequence_that_occurs_often_counts_as_often():
    report = report_of(Copy(), valid_ids=HELD_OUT[:5] + TRAIN[:1] * 3)
    assert report["n"]["contaminated"] == 3
    assert report["contamination"] == 3 / 8


def test_a_memoriser_has_no_novelty():
    report = report_of(Memoriser())
    assert "memorisation" in report["alarms"]["novelty"]
    assert "latent_use" not in report["alarms"]
    assert report["valid"] == 1
    assert report["novel"] == report["valid_unique_novel"] == 0
    assert report["gaussian"]["novel"] == 0
    assert report["exact_match"] == 0


class Gaussian(Copy):
    """Codes that are draws of the prior, whatever the sequences."""

    latent_size = 16

    def encode_ids(self, ids):
        return torch.randn(len(ids), 16, generator=torch.Generator().manual_seed(len(ids)))


def test_an_isotropic_gaussian_is_told_from_the_prior_by_nothing():
    report = report_of(Gaussian())
    for name, (low, high) in report["intervals"]["controls"]["prior"].items():
        assert low - (high - low) <= report[name] <= high + (high - low), name
    assert report["intervals"]["mmd"][0] < 0 < report["intervals"]["mmd"][1]
    assert report["active_dimensions"] == 16
    assert report["probe"]["r2"] < 0.1
    assert "latent_use" not in report["alarms"]


def test_no_better_than_a_trigram_model_is_an_alarm():
    assert (
        "no better than chance"
        in report_of(Memoriser(), check="regex:[0-9]+")["alarms"]["validity"]
    )
    real = report_of(Copy(), check=None)
    assert "validity" not in real["alarms"]


def test_the_pictures_show_the_codes():
    report = report_of(Copy())
    shown = report["pictures"]
    assert sum(row["n"] for row in shown["by_length"]) == len(HELD_OUT)
    assert {row["exact_match"] for row in shown["by_length"]} == {1}
    z_ND = Copy().encode_ids(HELD_OUT).double()
    assert sum(shown["eigenvalues"]) == pytest.approx(
        z_ND.var(0, correction=0).sum().item(), abs=0.01
    )
    assert shown["map"]["share"] == pytest.approx(
        sum(shown["eigenvalues"][:2]) / sum(shown["eigenvalues"]), abs=0.01
    )
    spread = np.var(shown["map"]["x"])
    assert spread == pytest.approx(shown["eigenvalues"][0], abs=0.01)
    assert shown["values"] == [len(row) - 1 for row in HELD_OUT]
    assert len(shown["quantiles"]["values"][0]) == T


def test_the_report_is_json_repeats_by_seed_and_has_the_agreed_names():
    report = report_of(Copy())
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report_of(Copy()) == report
    assert report_of(Copy(), seed=1) != report
    assert report.keys() >= {
        "schema_version",
        "exact_match",
        "token_accuracy",
        "edit_similarity",
        "valid",
        "unique",
        "novel",
        "shuffled_gap",
        "participation_ratio",
        "mmd",
    }
    assert report["interpolation"].keys() >= {"validity", "directness"}
    assert report["controls"]["trigram"].keys() >= {"valid", "unique", "novel"}
    assert report["n"]["held_out"] == len(HELD_OUT)


def test_without_a_check_validity_is_left_out():
    report = report_of(Copy(), check=None)
    assert report["valid"] is None
    assert report["interpolation"]["validity"] is None
    assert report["novel"] > 0
    assert "none" in table(report).title


def test_the_table_shows_every_metric_beside_its_control():
    report = json.loads(json.dumps(report_of(Copy())))
    console = Console(width=140)
    with console.capture() as captured:
        console.print(table(report))
    text = captured.get()
    assert "exact match" in text
    assert f"trigram {report['controls']['trigram']['valid']:.3f}" in text


@pytest.mark.parametrize(
    "options",
    [
        {"valid_ids": HELD_OUT[:3]},
        {"training": given(Copy(), [])},
        {"samples": 0},
        {"interpolations": 0},
        {"steps": 1},
        {"check": "no"},
        {"measure": "no"},
    ],
)
def test_too_little_to_evaluate_is_a_user_error(options):
    with pytest.raises(UserError):
        report_of(Copy(), **options)


@pytest.fixture(scope="module")
def real():
    """A tiny random T5VAE with a tokenizer, and lines for it."""
    lines = [f"x{i} = {i} + y" for i in range(120)]
    tokenizer = train_tokenizer(lines, 300)
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5VAEConfig(
        t5={"vocab_size": len(tokenizer), **sizes}, latent_size=6, sequence_length=20
    )
    space = LatentSpace(T5VAE(config), tokenizer)
    ids = space.tokenize(lines)
    return SimpleNamespace(
        space=space,
        given={
            "valid_ids": ids[:20],
            "training": GivenTraining(ids[20:], lines[20:]),
            "check": "python",
            "samples": 30,
            "interpolations": 3,
        },
    )


def test_a_real_model_is_evaluated(real):
    report = evaluate(real.space, **real.given)
    json.dumps(report, allow_nan=False)
    assert report["shuffled_gap"] != 0
    assert report["controls"]["trigram"]["valid"] > 0.5


@pytest.mark.slow
def test_a_real_model_that_ignores_its_code_has_no_shuffled_gap(real):
    torch.nn.init.zeros_(real.space.model.bottleneck.from_latent.weight)
    assert evaluate(real.space, **real.given)["shuffled_gap"] == pytest.approx(0, abs=1e-6)
