import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from shards.format.tokenizers import load_tokenizer, train_tokenizer
from t5vae.common.errors import UserError
from t5vae.latent import LatentSpace
from tests.latent.tiny import random_model

LINES = ["x = a + 1", "y = b - 2", "print(x)", "return None", "import  os", "s = 'é → ü'"]


@pytest.fixture(scope="module", params=["bpe", "byte"])
def run_folder(request, tmp_path_factory):
    """A run folder whose export is a tiny random model."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = train_tokenizer(LINES, 300) if request.param == "bpe" else load_tokenizer("byte")
    random_model(len(tokenizer), sequence_length=24).save_pretrained(folder / "export")
    tokenizer.save_pretrained(folder / "export")
    return folder


@pytest.fixture(scope="module")
def space(run_folder):
    return LatentSpace.load(run_folder, device="cpu")


def test_a_run_and_its_export_load_the_same_model(run_folder, space):
    other = LatentSpace.load(str(run_folder / "export"), device="cpu")
    assert torch.equal(other.encode(LINES), space.encode(LINES))


def test_strings_survive_the_tokenizer(space):
    texts = [*LINES, "", " a  b ", "a </s> b <pad>"]
    ids = space.tokenize(texts)
    assert all(row[-1] == 1 and 1 not in row[:-1] for row in ids)
    assert space.detokenize(ids) == texts


def test_encode_is_the_model_s_code_whatever_the_batch(space):
    z_ND = space.encode(LINES)
    assert (z_ND.dtype, z_ND.device.type, z_ND.shape) == (torch.float32, "cpu", (6, 6))
    small = LatentSpace(space.model, space.tokenizer, batch_size=2)
    torch.testing.assert_close(small.encode(LINES), z_ND)
    ids = torch.tensor([space.tokenize(LINES)[2]])
    torch.testing.assert_close(space.model(input_ids=ids, mode="encode").detach()[0], z_ND[2])
    assert space.encode([]).shape == (0, 6)


def test_reconstruct_decodes_the_codes_in_order(space):
    texts = space.reconstruct(LINES)
    assert texts == space.decode(space.encode(LINES))
    assert texts == LatentSpace(space.model, space.tokenizer, batch_size=4).reconstruct(LINES)
    assert space.reconstruct([]) == []


def test_decode_gives_n_candidates_per_code(space):
    z_ND = space.encode(LINES[:3])
    for temperature in (0.0, 1.0):
        candidates = space.decode(z_ND, n=4, temperature=temperature)
        assert [len(texts) for texts in candidates] == [4, 4, 4]
    assert len(set(candidates[0])) > 1
    assert space.decode(z_ND, 4, 1.0, seed=3) == space.decode(z_ND, 4, 1.0, seed=3)
    assert space.decode(z_ND, 4, 1.0, seed=3) != space.decode(z_ND, 4, 1.0, seed=4)


def test_decoding_leaves_the_global_generator_alone(space):
    before = torch.get_rng_state()
    space.decode(torch.zeros(1, 6), temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_interpolation_ends_at_the_reconstructions(space, method):
    texts = space.interpolate(LINES[0], LINES[1], steps=5, method=method)
    assert len(texts) == 5
    assert [texts[0], texts[-1]] == space.reconstruct(LINES[:2])


def test_sample_repeats_by_seed_and_fits_a_gaussian(space):
    normal = space.sample(5, seed=1, temperature=1.0)
    assert (len(normal.texts), normal.drawn) == (5, 5)
    assert space.sample(5, seed=1, temperature=1.0) == normal
    fitted = space.sample(5, "gaussian", fit=LINES)
    assert fitted == space.sample(5, "gaussian", fit=space.encode(LINES))


def test_sample_with_a_check_keeps_valid_ones_and_counts_all(space):
    drawn = []

    def every_third(text):
        drawn.append(text)
        return len(drawn) % 3 == 0

    result = space.sample(40, check=every_third, temperature=1.0)
    assert result.texts == drawn[2::3]
    assert (len(result.texts), result.drawn) == (40, 120)


def test_sample_gives_up_after_a_bounded_number_of_draws(space, monkeypatch):
    monkeypatch.setattr(space, "decode_ids", lambda z_ND, **_: [[1]] * len(z_ND))
    with pytest.raises(UserError, match="only 0 of 2000 samples pass the check 'python'"):
        space.sample(3, check="python")


def test_score_is_each_row_s_cross_entropy_under_its_code(space):
    ids = space.tokenize(LINES)
    z_ND = torch.randn(6, 6)
    nll_N = space.score_ids(ids, z_ND)
    for row, z_D, nll in zip(ids, z_ND, nll_N, strict=True):
        labels = torch.tensor([row])
        logits = space.model(labels=labels, latent=z_D[None]).logits[0]
        expected = torch.nn.functional.cross_entropy(logits, labels[0], reduction="sum")
        torch.testing.assert_close(nll, expected.detach())


def test_a_text_that_is_too_long_is_named(space):
    text = "abcdefghij" * 20
    with pytest.raises(UserError) as caught:
        space.encode(["x", text])
    message = str(caught.value)
    assert text[:37] + "..." in message
    assert "24 at most" in message
    assert str(len(space.tokenizer(text)["input_ids"])) in message


def test_one_string_is_not_taken_for_a_list(space):
    with pytest.raises(TypeError, match="list"):
        space.encode("x = 1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prior": "vampprior"}, "unknown prior 'vampprior'"),
        ({"prior": "gaussian"}, "no run beside it, so its training sequences are unknown"),
        ({"prior": "gaussian", "fit": ["x"]}, "1 given, at least 2 needed"),
        ({"check": "pyhton"}, "unknown checker"),
    ],
)
def test_sample_refuses_what_it_does_not_know(space, arguments, message):
    with pytest.raises(UserError, match=message):
        space.sample(2, **arguments)


def test_wrong_folders_name_the_export_command(run_folder, tmp_path):
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "t5" / "tokenizer_config.json").write_text("{}")
    shutil.copytree(run_folder / "export", tmp_path / "weightless")
    (tmp_path / "weightless" / "model.safetensors").unlink()
    shutil.copytree(run_folder / "export", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    shutil.copytree(run_folder / "export", tmp_path / "holed")
    holed = load_file(tmp_path / "holed" / "model.safetensors")
    del holed["bottleneck.to_latent.weight"]
    save_file(holed, tmp_path / "holed" / "model.safetensors", metadata={"format": "pt"})
    for name in ("nowhere", ".", "run", "t5", "weightless", "cut", "holed"):
        with pytest.raises(UserError, match="t5vae export") as caught:
            LatentSpace.load(tmp_path / name)
        assert "\n" not in str(caught.value)
