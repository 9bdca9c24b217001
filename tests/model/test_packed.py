"""Layers on real tokens alone give what transformers' give on padded ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from t5vae.model import T5VAE
from t5vae.model.packed import Layout

LONGEST = 9


def sequences(lengths: list[int]) -> torch.Tensor:
    """Random ones of these lengths, padded with 0."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids_BT = torch.randint(2, 26, (len(lengths), max(1, *lengths)), generator=generator)
    return ids_BT.masked_fill(torch.arange(ids_BT.shape[1]) >= torch.tensor(lengths)[:, None], 0)


@pytest.fixture
def padded(monkeypatch):
    """Computes something with transformers' own stacks."""

    def compute(function):
        with monkeypatch.context() as patch:
            patch.setattr(T5VAE, "_packs", lambda *_: False)
            return function()

    return compute


def scored(model: T5VAE, ids_BT: torch.Tensor, labels_BT: torch.Tensor, **options):
    """The loss, each row's, the code, and all gradients."""
    output = model(ids_BT, labels=labels_BT, mode="score", **options)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(output.loss, weights, allow_unused=True)
    return output.loss, output.nll, output.latent, gradients


@pytest.mark.parametrize("architecture", ["t5", "t5-v1.1", "mt5", "umt5"])
@pytest.mark.parametrize(
    "config",
    [{"bottleneck": "flatten"}, {"bottleneck": "attention"}, {"mask_padding": False}],
    ids=["flatten", "attention", "legacy"],
)
def test_losses_codes_and_gradients_are_transformers(build, padded, architecture, config):
    model = build(architecture, **config)
    ids_BT = sequences([9, 1, 4, 7, 2])
    assert model._packs(ids_BT)
    torch.testing.assert_close(
        scored(model, ids_BT, ids_BT), padded(lambda: scored(model, ids_BT, ids_BT))
    )


@pytest.mark.parametrize(
    "labels",
    [
        [[5, 6, 1, 0], [7, 1, 0, 0], [0, 0, 0, 0]],
        [[5, -100, 1, 0], [-100, 1, 0, 0], [9, 9, 9, 1]],
        [[-100] * 4] * 3,
    ],
    ids=["a row of pads", "holes", "none at all"],
)
def test_labels_that_do_not_count_change_nothing(build, padded, labels):
    model, labels_BT = build(), torch.tensor(labels)
    ids_BT = sequences([4, 2, 3])
    torch.testing.assert_close(
        scored(model, ids_BT, labels_BT), padded(lambda: scored(model, ids_BT, labels_BT))
    )


@pytest.mark.parametrize("lengths", [[9, 1, 4, 7, 2], [6, 6, 6], [5], [0, 0]])
@pytest.mark.parametrize("way", ["packed", "padded"])
@pytest.mark.parametrize("bottleneck", ["flatten", "attention"])
def test_places_that_are_given_change_nothing(build, padded, bottleneck, way, lengths):
    model = build(bottleneck=bottleneck)
    ids_BT = sequences(lengths)
    places_N = (ids_BT != 0).flatten().nonzero()[:, 0]

    def compare():
        torch.testing.assert_close(
            scored(model, ids_BT, ids_BT, places=places_N), scored(model, ids_BT, ids_BT)
        )

    compare() if way == "packed" else padded(compare)


@pytest.mark.parametrize("way", ["packed", "padded"])
def test_a_row_that_has_no_places_adds_nothing_and_changes_no_other(build, padded, way):
    model, ids_BT = build(bottleneck="flatten"), sequences([4, 6, 2])
    labels_BT = ids_BT.clone()
    labels_BT[1] = -100
    places_N = (labels_BT > 0).flatten().nonzero()[:, 0]

    def compare():
        with_places = model(ids_BT, labels=labels_BT, places=places_N, mode="score")
        without = model(ids_BT, labels=labels_BT, mode="score")
        torch.testing.assert_close(with_places.nll, without.nll)
        assert with_places.nll[1] == 0
        torch.testing.assert_close(with_places.latent[::2], without.latent[::2])

    compare() if way == "packed" else padded(compare)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_mask_that_is_made_of_places_hides_pads_from_every_attention(build, padded, attention):
    model = build(bottleneck="attention")
    model.set_attn_implementation(attention)
    ids_BT = sequences([9, 3])
    longer_BT = torch.nn.functional.pad(ids_BT, (0, 5))

    def codes(ids_BT):
        places_N = (ids_BT != 0).flatten().nonzero()[:, 0]
        return model(ids_BT, labels=ids_BT, places=places_N, mode="score").latent

    torch.testing.assert_close(padded(lambda: codes(longer_BT)), padded(lambda: codes(ids_BT)))


def test_a_mask_with_holes_hides_what_it_says(build, padded):
    model, ids_BT = build(), sequences([5, 5])
    mask_BT = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 1]])

    def codes():
        return model(ids_BT, attention_mask=mask_BT, mode="encode")

    torch.testing.assert_close(codes(), padded(codes))


def test_dropout_falls_on_states_and_attention(build):
    model = build(t5={"dropout_rate": 0.5}).train()
    ids_BT = sequences([9, 4])
    torch.manual_seed(0)
    first, second = (model(ids_BT, mode="encode") for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(model(ids_BT, mode="encode"), first)
    torch.testing.assert_close(model.eval()(ids_BT, mode="encode"), model(ids_BT, mode="encode"))


def test_layers_that_are_compiled_or_checkpointed_are_transformers(build):
    ids_BT = sequences([3, 2])
    model = build()
    model.gradient_checkpointing_enable()
    assert not model._packs(ids_BT)
    assert not build().half()._packs(ids_BT)
    assert not model._packs(ids_BT.to("meta"))


@given(st.lists(st.integers(0, LONGEST), min_size=1, max_size=6))
def test_packing_and_unpacking_give_real_tokens_back(lengths):
    real_BT = torch.arange(LONGEST) < torch.tensor(lengths)[:, None]
    layout = Layout.of(real_BT)
    x_BTC = torch.randn(*real_BT.shape, 3)
    there_and_back = layout.unpack(layout.pack(x_BTC))
    if real_BT.any():
        assert torch.equal(there_and_back, x_BTC * real_BT[..., None])
    assert torch.equal(layout.tokens[real_BT], torch.arange(int(real_BT.sum())))
