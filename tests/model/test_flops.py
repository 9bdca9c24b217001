"""The formulas equal what torch's counter sees a model do, exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from t5vae.common.kinds import BOTTLENECKS
from t5vae.model import T5VAE, T5VAEConfig
from t5vae.model.flops import flops_per_token, parameter_counts, training_flops

pytestmark = pytest.mark.usefixtures("padded_layers")

T5 = {
    "d_model": 12,
    "d_kv": 5,  # 3 heads of 5, in a model 12 wide
    "num_heads": 3,
    "d_ff": 14,
    "num_layers": 2,
    "vocab_size": 17,
    "dropout_rate": 0.0,
}
LENGTHS = [7, 1, 4, 5, 2]  # of a batch padded to 8 tokens, in a model of 9
PADDED = 8
TABLE = {
    "relu": {},
    "gated": {"t5": {"feed_forward_proj": "gated-gelu"}},
    "mt5": {"t5": {"model_type": "mt5"}},
    "umt5": {"t5": {"model_type": "umt5"}},
    "deep decoder": {"t5": {"num_decoder_layers": 3}},
    "heads as wide as the model": {"t5": {"d_kv": 4}},
    "own output layer": {"tie_word_embeddings": False},
    "pads seen": {"mask_padding": False},
    "squash and norm": {"squash": "tanh", "normalize": True},
}


def configuration(bottleneck: str, t5: dict | None = None, **options) -> T5VAEConfig:
    sizes = {"latent_size": 6, "sequence_length": 9, "token_size": 5, "memory_length": 3}
    return T5VAEConfig(t5={**T5, **(t5 or {})}, bottleneck=bottleneck, **{**sizes, **options})


def padded(lengths: list[int], width: int) -> torch.Tensor:
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long() * 5


def counted(config: T5VAEConfig, ids: torch.Tensor, labels: torch.Tensor) -> tuple[int, int]:
    """Operations of the forward pass and of the backward pass."""
    model = T5VAE(config)
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    # torch counts no product inside the fused attention of a CPU.
    with sdpa_kernel(SDPBackend.MATH):
        with forward:
            loss = model(ids, labels=labels, mode="score").loss
        with backward:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def assert_exact(config: T5VAEConfig, ids: torch.Tensor, labels: torch.Tensor) -> None:
    forward, backward = counted(config, ids, labels)
    scored = int((labels != 0).sum())
    formula = training_flops(config, len(ids), ids.shape[1], labels.shape[1], scored)
    assert 3 * forward == formula
    # No product is without one of its two gradients: the first layers' inputs are trained
    # embeddings, the pooling queries are trained, and every code and memory depends on weights.
    assert backward == 2 * forward


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
@pytest.mark.parametrize("case", TABLE)
def test_operations_are_those_that_torch_counts(case, bottleneck):
    ids = padded(LENGTHS, PADDED)
    assert_exact(configuration(bottleneck, **TABLE[case]), ids, ids)


@pytest.mark.parametrize("pads_seen", [False, True])
def test_operations_of_a_low_rank_expansion_are_those_that_torch_counts(pads_seen):
    config = configuration("flatten", expansion_rank=4, mask_padding=not pads_seen)
    ids = padded(LENGTHS, PADDED)
    assert_exact(config, ids, ids)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(data=st.data(), bottleneck=st.sampled_from(sorted(BOTTLENECKS)))
def test_operations_are_those_that_torch_counts_at_any_size(data, bottleneck):
    size = st.integers(1, 6)
    heads = data.draw(size)
    t5 = {name: data.draw(size) for name in ("d_kv", "d_ff", "num_layers", "num_decoder_layers")}
    t5 |= {"num_heads": heads, "d_model": heads * data.draw(size)}
    names = ("latent_size", "token_size", "memory_length", "sequence_length")
    options = {name: data.draw(size) for name in names}
    options["expansion_rank"] = data.draw(st.none() | size)
    options["mask_padding"] = data.draw(st.booleans())
    width = data.draw(st.integers(1, options["sequence_length"]))
    lengths = data.draw(st.lists(st.integers(1, width), min_size=1, max_size=4))
    labels = padded([length + 2 for length in lengths], width + 3)
    assert_exact(configuration(bottleneck, t5, **options), padded(lengths, width), labels)


def test_attention_encodes_more_tokens_than_sequence_length_at_the_cost_of_what_it_sees():
    ids = padded([11, 3], 11)
    assert_exact(configuration("attention", mask_padding=False), ids, ids)


def test_every_token_is_scored_by_default():
    config = configuration("flatten")
    assert training_flops(config, 4, 8, 7) == training_flops(config, 4, 8, 7, 28)


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
def test_operations_per_token_times_tokens_are_those_of_a_batch_without_pads(bottleneck):
    config = configuration(bottleneck)
    ids = padded([8] * 4, 8)
    assert flops_per_token(config, 8) * 32 == sum(counted(config, ids, ids))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_parameters_by_part_are_all_parameters_once(device, bottleneck, tied):
    with torch.device(device):
        model = T5VAE(configuration(bottleneck, tie_word_embeddings=tied))
    counts = parameter_counts(model)
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert sum(counts.values()) == 2 * counts["total"]
    table = T5["vocab_size"] * T5["d_model"]
    assert counts["embedding"] == table
    assert counts["output"] == (0 if tied else table)
    parts = {"encoder": model.t5.encoder, "decoder": model.t5.decoder}
    for name, stack in parts.items():  # each holds the embedding too
        assert counts[name] == sum(p.numel() for p in stack.parameters()) - table
    assert counts["bottleneck"] == sum(p.numel() for p in model.bottleneck.parameters())
