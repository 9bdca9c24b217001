"""What is kept with a run, or with an export that lies alone, and used again."""

import shutil

import pytest
import torch

from t5vae.common.errors import UserError
from t5vae.common.kinds import PRIORS
from t5vae.latent import LatentSpace, priors, workspace
from t5vae.latent.priors.flow import Flow
from t5vae.latent.priors.gaussian import Gaussian
from t5vae.latent.workspace import Workspace
from tests.latent import tiny


@pytest.fixture
def run(made_run, tmp_path):
    """A copy to write into."""
    return shutil.copytree(made_run, tmp_path / "run")


@pytest.fixture
def space(run):
    return LatentSpace.load(run, device="cpu")


@pytest.fixture
def alone(run, tmp_path):
    """An export without its run."""
    return LatentSpace.load(shutil.copytree(run / "export", tmp_path / "alone"), device="cpu")


def test_training_sequences_are_encoded_once_and_kept_with_the_run(space, run, capsys):
    corpus = space.training()
    assert corpus.folder == run / "latent" / "train"
    texts = corpus.texts(range(len(corpus)))
    assert set(texts) < set(tiny.LINES)
    torch.testing.assert_close(corpus.codes_ND, space.encode(texts))
    assert capsys.readouterr().err.count("encoded") == 1
    for given in (run, run / "export"):
        again = LatentSpace.load(given, device="cpu").training()
        assert torch.equal(again.codes_ND, corpus.codes_ND)
    assert "encoded" not in capsys.readouterr().err


def test_what_is_kept_needs_no_shards(space, run):
    drawn = space.sample(5, "gaussian")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("/data", "/gone"))
    moved = LatentSpace.load(run, device="cpu")
    assert moved.sample(5, "gaussian") == drawn
    assert len(moved.nearest(["x"], 3)[0]) == 3


@pytest.mark.parametrize("name", ["gaussian", "gmm", "flow"])
def test_priors_are_fitted_once_on_training_sequences(space, run, name, monkeypatch):
    monkeypatch.setattr(Flow, "STEPS", 20)
    drawn = space.sample(5, name, temperature=1.0)
    assert (run / "latent" / "priors" / f"{name}.safetensors").is_file()
    corpus = space.training()
    given = space.sample(5, name, temperature=1.0, fit=corpus.codes_ND)
    assert given == drawn

    def refit(*_):
        raise AssertionError("fitted again")

    monkeypatch.setattr(workspace, "fit_prior", refit)
    assert LatentSpace.load(run, device="cpu").sample(5, name, temperature=1.0) == drawn


class Toy(Gaussian):
    """A prior from outside."""


@pytest.mark.parametrize("toy", [Toy, f"{__name__}:Toy"])
def test_a_prior_from_outside_is_one_line_in_the_table(space, run, toy, monkeypatch):
    monkeypatch.setitem(PRIORS, "toy", toy)
    drawn = space.sample(5, "toy", temperature=1.0)
    assert (run / "latent" / "priors" / "toy.safetensors").is_file()
    again = LatentSpace.load(run, device="cpu")
    assert isinstance(again.prior("toy"), Toy)
    assert again.sample(5, "toy", temperature=1.0) == drawn
    assert isinstance(again.prior("toy", fit=["x", "y"]), Toy)
    with pytest.raises(UserError, match=r"choose one of normal, .*, toy"):
        again.prior("toys")


def test_a_share_of_the_training_sequences_is_fitted_on_the_same_one_each_time(space, monkeypatch):
    corpus = space.training()
    monkeypatch.setattr(workspace, "FIT", 30)
    rows = Workspace.fitting_rows(corpus)
    assert len(set(rows.tolist())) == 30
    assert rows.tolist() == Workspace.fitting_rows(corpus).tolist()
    expected = priors.fit_prior("gaussian", corpus.codes_ND[rows])
    found = space.prior("gaussian")
    assert isinstance(found, Gaussian)
    assert torch.equal(found.mean_D, expected.mean_D)


def test_another_model_in_the_run_starts_anew(space, run):
    first = space.training()
    space.get_property("length")
    space.prior("gaussian")
    tiny.export(run / "export", seed=1)
    other = LatentSpace.load(run, device="cpu")
    assert other.workspace.property(other, "length") is None
    texts = first.texts([0])
    again = other.training()
    assert again.texts([0]) == texts
    torch.testing.assert_close(again.codes_ND[:1], other.encode(texts))
    assert torch.equal(
        other.prior("gaussian").mean_D, priors.fit_prior("gaussian", again.codes_ND).mean_D
    )


def test_a_property_that_is_a_measure_is_fitted_at_need_and_kept(space, run):
    length = space.get_property("length")
    corpus = space.training()
    assert (length.kind, length.n) == ("ridge", len(corpus))
    assert (run / "latent" / "properties" / "length.safetensors").is_file()
    assert repr(space.get_property("length")) == repr(length)
    own = space.fit_property(["a" * i for i in range(1, 30)], "length", kind="mlp", name="length")
    space.keep_property(own)
    assert space.get_property("length").kind == "mlp"


def test_texts_that_are_too_long_are_left_out_of_a_fit(space):
    texts = ["a" * i for i in range(1, 60)]
    by_function = space.fit_property(texts, "length")
    by_values = space.fit_property(texts, [float(len(text)) for text in texts])
    assert by_function.n == by_values.n == 39
    assert torch.equal(by_function.predict(torch.ones(1, 6)), by_values.predict(torch.ones(1, 6)))
    with pytest.raises(UserError, match="2 values for 59 texts"):
        space.fit_property(texts, [1.0, 2.0])


def test_an_unknown_property_names_what_there_is(space):
    with pytest.raises(UserError, match=r"no property 'solubility' is kept.*one of length, calls"):
        space.get_property("solubility")


@pytest.mark.parametrize("name", ["", "../escape", "a/b", ".hidden", "a b", "x\n"])
def test_a_property_s_name_is_a_file_s(space, run, name):
    fitted = space.fit_property(["a" * i for i in range(1, 30)], "length", name=name)
    with pytest.raises(UserError, match="a property cannot be kept as"):
        space.keep_property(fitted)
    assert not (run / "latent").exists()


def test_an_export_that_lies_alone_keeps_its_own(alone, tmp_path):
    texts = ["a" * i for i in range(1, 30)]
    alone.keep_property(alone.fit_property(texts, "length", name="length"))
    assert (tmp_path / "alone" / "latent" / "properties" / "length.safetensors").is_file()
    corpus = alone.encode_corpus(texts, tmp_path / "codes")
    assert alone.nearest(["aaa"], 2, corpus)[0][0].text == "aaa"
    for need in (alone.training, lambda: alone.sample(2, "flow")):
        with pytest.raises(UserError, match="no run beside it, so its training sequences are un"):
            need()


def test_a_model_in_memory_keeps_nothing(space, tmp_path):
    bare = LatentSpace(space.model, space.tokenizer)
    corpus = space.encode_corpus(tiny.LINES, tmp_path / "codes")
    assert bare.nearest(tiny.LINES[:1], 1, corpus) == space.nearest(tiny.LINES[:1], 1, corpus)
    for need in (
        bare.training,
        lambda: bare.sample(2, "gaussian"),
        lambda: bare.get_property("length"),
        lambda: bare.encode_corpus(tiny.LINES, tmp_path / "other"),
    ):
        with pytest.raises(UserError, match="nothing is kept with a model in memory"):
            need()


def test_a_damaged_prior_says_what_to_do(space, run):
    space.prior("gaussian")
    path = run / "latent" / "priors" / "gaussian.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"gaussian.safetensors is damaged .*: remove it"):
        space.sample(2, "gaussian")


def test_the_nearest_of_a_text_in_the_corpus_is_itself(space):
    corpus = space.training()
    texts = corpus.texts([5, 0])
    found = space.nearest(texts, 4)
    assert [near[0].text for near in found] == texts
    assert [near[0].distance for near in found] == pytest.approx([0, 0], abs=1e-5)
    for near in found:
        distances = [each.distance for each in near]
        assert len(near) == 4
        assert distances == sorted(distances)


def test_outlier_scores_are_nats_a_token(space):
    texts = ["x = 1", "", "longer text"]
    ids = space.tokenize(texts)
    nll_N = space.score_ids(ids, space.encode(texts))
    lengths_N = torch.tensor([6, 1, 12])
    torch.testing.assert_close(space.outlier_scores(texts), nll_N / lengths_N)


def test_repeats_are_found_among_texts_and_in_a_corpus(space, tmp_path):
    texts = ["x = 1", "print(y)", "x = 1", "return", "print(y)"]
    assert space.deduplicate(texts, 0) == [0, 1, 0, 3, 1]
    assert space.deduplicate(texts, 99) == [0] * 5
    corpus = space.encode_corpus(texts, tmp_path / "codes")
    assert space.deduplicate(corpus, 0) == [0, 1, 0, 3, 1]


def test_a_grid_has_the_reconstructions_for_corners(space):
    corners = tiny.LINES[:4]
    rows = space.grid(*corners, steps=3)
    assert [len(row) for row in rows] == [3, 3, 3]
    assert [rows[0][0], rows[0][2], rows[2][0], rows[2][2]] == space.reconstruct(corners)
    assert rows[0] == space.interpolate(*corners[:2], steps=3)
