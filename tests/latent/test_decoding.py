"""Decoding that leaves out ended rows, beside transformers' `generate`."""

import math

import pytest
import torch

from shards.format.tokenizers import load_tokenizer
from t5vae.common.errors import UserError
from t5vae.latent.codec import Codec
from t5vae.latent.decoding import _drawn
from t5vae.model import T5VAE
from tests.latent.tiny import random_model

LENGTH, LATENT = 12, 6


@pytest.fixture(params=[("flatten", True), ("flatten", False), ("attention", False)], ids=str)
def model(request) -> T5VAE:
    """A random model whose rows end at different steps."""
    bottleneck, tied = request.param
    how = {"bottleneck": bottleneck, "tie_word_embeddings": tied, "t5": {"num_layers": 2}}
    model = random_model(40, latent_size=LATENT, sequence_length=LENGTH, **how)
    with torch.no_grad():
        for name, parameter in model.bottleneck.named_parameters():
            if "from_latent" in name:
                parameter *= 20  # so that rows differ
        model.t5.lm_head.weight[model.end] *= 3  # so that rows end
    return model


@pytest.fixture
def codec(model):
    return Codec(model, load_tokenizer("byte"), batch_size=64)


@pytest.fixture
def batches(model):
    """How many rows each call of the decoder has computed."""
    sizes = []
    model.t5.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return sizes


def codes(n: int) -> torch.Tensor:
    return torch.randn(n, LATENT, generator=torch.Generator().manual_seed(1))


def generated(codec: Codec, z_ND: torch.Tensor) -> list[list[int]]:
    ids_NT = codec.model.generate(latent=z_ND, do_sample=False)[:, 1:]
    return [codec._until_end(row) for row in ids_NT.tolist()]


def test_greedy_tokens_are_those_of_generate(codec, batches):
    expected = generated(codec, codes(64))
    batches.clear()
    assert codec.decode_ids(codes(64)) == expected
    assert len({len(row) for row in expected}) > 3
    assert len(set(batches)) > 2
    codec.batch_size = 10
    assert codec.decode_ids(codes(64)) == expected


def test_a_row_without_an_end_is_cut_at_the_model_s_length(codec):
    rows = codec.decode_ids(codes(64))
    uncut = [row for row in rows if row[-1] != codec.model.end]
    assert uncut
    assert {len(row) for row in uncut} == {LENGTH}


def test_decoding_stops_with_the_last_row(codec, batches):
    z_ND, rows = codes(64), codec.decode_ids(codes(64))
    ended = [i for i, row in enumerate(rows) if row[-1] == codec.model.end]
    batches.clear()
    decoded = codec.decode_ids(z_ND[ended])
    assert decoded == [rows[i] for i in ended]
    assert len(batches) == max(map(len, decoded)) < LENGTH


def test_bfloat16_decodes_as_generate_does(codec):
    codec.model.to(torch.bfloat16)
    expected = generated(codec, codes(64))
    assert codec.decode_ids(codes(64)) == expected


def test_draws_of_the_coldest_softmax_are_greedy(codec, batches):
    expected = codec.decode_ids(codes(64))
    assert codec.decode_ids(codes(64), temperature=1e-6) == expected
    assert len(set(batches)) > 2


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_first_tokens_are_as_frequent_as_the_softmax_says(codec, temperature):
    z_1D, draws = codes(1), 4000
    first = torch.tensor([row[0] for row in codec.decode_ids(z_1D, draws, temperature)])
    start = torch.full((1, 1), codec.model.start)
    logits_V = codec.model(latent=z_1D, decoder_input_ids=start).logits[0, 0].detach()
    expected_V = (logits_V / temperature).softmax(-1)
    found_V = first.bincount(minlength=len(logits_V)) / draws
    deviation_V = (expected_V * (1 - expected_V) / draws).sqrt()
    assert ((found_V - expected_V).abs() <= 5 * deviation_V + 1 / draws).all()


def test_draws_repeat_by_seed_and_differ_among_rows(codec):
    z_ND = codes(3)
    drawn = codec.decode_ids(z_ND, 40, 3.0, seed=3)
    assert len(drawn) == 120
    codec.batch_size = 7
    assert codec.decode_ids(z_ND, 40, 3.0, seed=3) == drawn
    assert codec.decode_ids(z_ND, 40, 3.0, seed=4) != drawn
    assert all(len({tuple(row) for row in drawn[i : i + 40]}) > 1 for i in (0, 40, 80))


def test_a_chance_picks_the_token_whose_share_it_falls_in():
    logits_BV = torch.tensor([[0.25, 1e-30, 0.5, 0.25]]).log().repeat(6, 1)
    chances_B = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-24])
    assert _drawn(logits_BV, 1.0, chances_B).tolist() == [0, 0, 2, 2, 3, 3]
    # At temperature 1/2 shares are squared: 1/6, 0, 2/3, 1/6.
    assert _drawn(logits_BV, 0.5, torch.full((6,), 0.17)).tolist() == [2] * 6


def test_the_global_generator_stays_where_it_is(codec):
    before = torch.get_rng_state()
    for temperature in (0.0, 1.0):
        codec.decode_ids(codes(4), temperature=temperature)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [-1.0, 1e-9, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(codec, temperature):
    with pytest.raises(UserError, match=r"the temperature is .*; give 0, or 1e-06 and more"):
        codec.decode(codes(2), temperature=temperature)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_codes_that_are_not_finite_are_refused(codec, value):
    z_ND = codes(3)
    z_ND[1, 2] = value
    with pytest.raises(UserError, match="codes are finite numbers; some of these are not"):
        codec.decode(z_ND)


def test_no_codes_decode_to_nothing(codec):
    assert codec.decode_ids(codes(0)) == []


@pytest.mark.parametrize(("synced", "n"), [(False, 3), (True, 1)])
def test_beams_and_ranks_in_step_are_left_to_generate(codec, monkeypatch, synced, n):
    calls = []

    def alone(synced_gpus, **how):
        calls.append(synced_gpus)
        return T5VAE.generate(codec.model, **how)

    monkeypatch.setattr(codec.model, "generate", alone)
    codec.synced_gpus = synced
    rows = codec.decode_ids(codes(5), n)
    assert calls == [synced]
    how = {"num_beams": n, "num_return_sequences": n, "do_sample": False}
    ids_NT = T5VAE.generate(codec.model, latent=codes(5), **how)[:, 1:]
    assert rows == [codec._until_end(row) for row in ids_NT.tolist()]


def test_token_ids_refuse_no_length(codec):
    long = "abcdefghij" * 20
    assert [len(row) for row in codec.token_ids(["", "x", long])] == [1, 2, 201]
    assert codec.token_ids([]) == []
    with pytest.raises(TypeError, match="list"):
        codec.token_ids("x")
