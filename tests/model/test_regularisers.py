import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t5vae.model import Regularisers, row_keys
from t5vae.model.noise import keyed_normal, keyed_uniform, splitmix64

MASK = (1 << 64) - 1
SEEDS = st.integers(0, 2**63 - 1)
POSITIONS = st.integers(0, 2**50)


def splitmix(x: int) -> int:
    """Steele, Lea and Flood (2014) in Python's integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def unsplitmix(x: int) -> int:
    """The inverse of `splitmix`."""
    x ^= (x >> 31) ^ (x >> 62)
    x = (x * pow(0x94D049BB133111EB, -1, 1 << 64)) & MASK
    x ^= (x >> 27) ^ (x >> 54)
    x = (x * pow(0xBF58476D1CE4E5B9, -1, 1 << 64)) & MASK
    x ^= (x >> 30) ^ (x >> 60)
    return (x - 0x9E3779B97F4A7C15) & MASK


def signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


@given(x=st.integers(-(2**63), 2**63 - 1))
def test_splitmix64_is_the_published_hash(x):
    assert splitmix64(torch.tensor(x)).item() == signed(splitmix(x & MASK))


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, position=POSITIONS, data=st.data())
def test_noise_of_a_row_does_not_depend_on_the_split_over_batches(seed, position, data):
    sequence_N = torch.tensor(data.draw(st.lists(st.integers(0, 2**40), min_size=1, max_size=9)))
    cut = data.draw(st.integers(0, len(sequence_N)))
    order = torch.tensor(data.draw(st.permutations(range(len(sequence_N)))))
    keys_N = row_keys(seed, position, sequence_N)
    shuffled_N = sequence_N[order]
    parts = [row_keys(seed, position, part) for part in (shuffled_N[:cut], shuffled_N[cut:])]
    for draw in (keyed_uniform, keyed_normal):
        split_ND = torch.cat([draw(keys_B, 5, 2) for keys_B in parts])
        assert torch.equal(split_ND, draw(keys_N, 5, 2)[order])


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, position=POSITIONS, other=POSITIONS)
def test_noise_differs_between_positions_seeds_rows_and_streams(seed, position, other):
    sequence_B = torch.arange(64)
    keys_B = row_keys(seed, position, sequence_B)
    assert len(keys_B.unique()) == 64
    assert keyed_uniform(keys_B, 8, 0).unique().numel() > 500
    if position != other:
        assert (keys_B != row_keys(seed, other, sequence_B)).all()
    assert (keys_B != row_keys(seed + 1, position, sequence_B)).all()
    assert (keyed_normal(keys_B, 8, 0) != keyed_normal(keys_B, 8, 1)).float().mean() > 0.99


def test_keyed_uniform_has_the_moments_of_a_uniform():
    u = keyed_uniform(row_keys(0, 0, torch.arange(2000)), 500, 0).double()
    n = u.numel()
    assert u.min() > 0
    assert u.max() < 1
    for power in (1, 2, 3, 4):  # within 5 standard errors
        error = math.sqrt(1 / (2 * power + 1) - 1 / (power + 1) ** 2) / math.sqrt(n)
        assert u.pow(power).mean().item() == pytest.approx(1 / (power + 1), abs=5 * error)
    histogram = torch.histc(u, 100, 0, 1)
    chi2 = ((histogram - n / 100) ** 2 / (n / 100)).sum()
    assert chi2 < 99 + 5 * math.sqrt(2 * 99)


def test_keyed_normal_has_the_moments_of_a_normal_and_no_correlation():
    x = keyed_normal(row_keys(0, 0, torch.arange(2000)), 500, 0).double()
    n = x.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert x.pow(power).mean().item() == pytest.approx(moment, abs=5 * math.sqrt(variance / n))
    bound = 5 / math.sqrt(n)
    assert abs((x[1:] * x[:-1]).mean()) < bound  # neighbouring rows
    assert abs((x[:, 1:] * x[:, :-1]).mean()) < bound  # neighbouring coordinates
    assert abs((x[:, 250:] * x[:, :250]).mean()) < bound * math.sqrt(2)
    other = keyed_normal(row_keys(0, 256, torch.arange(2000)), 500, 0).double()
    assert abs((x * other).mean()) < bound  # the same rows one step on


@pytest.mark.parametrize("bits", [0, MASK], ids=["lowest", "highest"])
def test_the_extreme_hashes_stay_strictly_between_0_and_1(bits):
    key = signed(unsplitmix(unsplitmix(bits) ^ splitmix(0)))
    u = keyed_uniform(torch.tensor([key]), 1, 0).item()
    assert 0 < u < 1


def seen_by(stack, call):
    """The ids that the encoder or the decoder got during a call."""
    seen = []
    hook = stack.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["input_ids"]), with_kwargs=True
    )
    try:
        call()
    finally:
        hook.remove()
    return seen[0]


@pytest.mark.usefixtures("padded_layers")
@torch.no_grad()
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, rate=st.sampled_from([0.0, 0.3, 1.0]), where=st.sampled_from(["in", "out"]))
def test_dropped_tokens_become_unknown_and_pad_end_and_start_never_do(build, seed, rate, where):
    # Ids as no T5 has them, so that none is taken for granted.
    model = build(t5={"pad_token_id": 3, "eos_token_id": 9, "decoder_start_token_id": 5})
    model.config.unknown_token_id = 7
    ids_BT = torch.randint(0, 12, (16, 9), generator=torch.Generator().manual_seed(seed))
    keys_B = row_keys(seed, 0, torch.arange(16))
    stack, name = (
        (model.t5.encoder, "input_mask") if where == "in" else (model.t5.decoder, "word_dropout")
    )
    plain_BT = seen_by(stack, lambda: model(ids_BT, mode="score"))
    noise = Regularisers(keys_B, **{name: rate})
    dropped_BT = seen_by(stack, lambda: model(ids_BT, mode="score", regularisers=noise))
    special_BT = torch.isin(plain_BT, torch.tensor([3, 5, 9]))
    assert special_BT.any()
    assert torch.equal(dropped_BT[special_BT], plain_BT[special_BT])
    changed_BT = dropped_BT != plain_BT
    assert (dropped_BT[changed_BT] == 7).all()
    if rate == 0:
        assert not changed_BT.any()
    if rate == 1:
        assert (dropped_BT[~special_BT] == 7).all()


@pytest.mark.usefixtures("padded_layers")
@torch.no_grad()
def test_tokens_are_dropped_at_the_given_rate(build):
    model = build(sequence_length=50)
    ids_BT = torch.full((800, 50), 7)
    noise = Regularisers(row_keys(3, 0, torch.arange(800)), input_mask=0.3)
    seen_BT = seen_by(model.t5.encoder, lambda: model(ids_BT, mode="encode", regularisers=noise))
    share = (seen_BT == 2).double().mean().item()
    assert share == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / ids_BT.numel()))


def noisy(sequence_B):
    keys_B = row_keys(0, 512, sequence_B)
    return Regularisers(keys_B, latent_noise=0.5, input_mask=0.4, word_dropout=0.4)


def test_regularised_loss_of_a_row_does_not_depend_on_its_batch_or_its_padding(model, ids_BT):
    sequence_B = torch.tensor([11, 3, 500, 7, 8, 9])
    whole_B = model(ids_BT, mode="score", regularisers=noisy(sequence_B)).nll
    for row, number, nll in zip(ids_BT, sequence_B, whole_B, strict=True):
        alone = model(row[row != 0][None], mode="score", regularisers=noisy(number[None]))
        torch.testing.assert_close(alone.nll[0], nll, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["latent_noise", "input_mask", "word_dropout"])
def test_each_regulariser_changes_the_loss_and_0_switches_it_off(model, ids_BT, name):
    keys_B = row_keys(0, 0, torch.arange(len(ids_BT)))
    plain_B = model(ids_BT, mode="score").nll
    off = Regularisers(keys_B, **{name: 0.0})
    assert torch.equal(model(ids_BT, mode="score", regularisers=off).nll, plain_B)
    on = Regularisers(keys_B, **{name: 0.9})
    regularised_B = model(ids_BT, mode="score", regularisers=on).nll
    assert (regularised_B != plain_B)[(ids_BT != 0).sum(1) > 2].all()


def test_noise_goes_to_the_decoder_and_not_into_the_reported_code(model, ids_BT):
    keys_B = row_keys(0, 0, torch.arange(len(ids_BT)))
    noise = Regularisers(keys_B, latent_noise=0.7)
    seen = []
    output = model(ids_BT, mode="score", regularisers=noise, on_latent=seen.append)
    z_BD = model(ids_BT, mode="encode")
    assert torch.equal(output.latent, z_BD)
    assert torch.equal(seen[0], z_BD)
    moved_BD = z_BD + 0.7 * keyed_normal(keys_B, z_BD.shape[1], 0).double()
    expected = model(latent=moved_BD, labels=ids_BT, mode="score").nll
    torch.testing.assert_close(output.nll, expected)
