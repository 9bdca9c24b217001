import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from transformers.modeling_outputs import BaseModelOutput


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_encode_gives_one_code_a_row(model, ids_BT):
    assert model(ids_BT, mode="encode").shape == (len(ids_BT), model.config.latent_size)
    assert model(input_ids=ids_BT, mode="encode").shape == (len(ids_BT), model.config.latent_size)


def test_expand_gives_the_memory_that_decoding_attends_to(model, ids_BT, z_BD):
    memory_BMC = model(latent=z_BD, mode="expand")
    config = model.config
    flat = config.bottleneck == "flatten"
    length = config.sequence_length if flat else config.memory_length
    assert memory_BMC.shape == (len(z_BD), length, config.t5["d_model"])
    start = torch.zeros(len(z_BD), 1, dtype=torch.int64)
    outputs = BaseModelOutput(last_hidden_state=memory_BMC)
    from_memory = model(encoder_outputs=outputs, decoder_input_ids=start).logits
    close(from_memory, model(latent=z_BD, decoder_input_ids=start).logits)


def test_decode_is_the_default_mode(model, ids_BT):
    output = model(ids_BT, labels=ids_BT)
    assert output.logits.shape == (*ids_BT.shape, model.config.t5["vocab_size"])
    close(output.logits, model(ids_BT, labels=ids_BT, mode="decode").logits)
    close(output.latent, model(ids_BT, mode="encode"))


def test_an_unknown_mode_is_a_value_error_that_names_the_modes(model, ids_BT):
    with pytest.raises(ValueError, match=r"'translate'.* score, decode or reconstruct"):
        model(ids_BT, mode="translate")


@pytest.mark.parametrize("shape", [(6,), (2, 5), (2, 6, 1)])
def test_a_latent_of_another_shape_is_a_value_error(model, shape):
    with pytest.raises(ValueError, match=r"give \[B, 6\]"):
        model.generate(latent=torch.zeros(shape))


def test_decoding_nothing_is_a_value_error(model, ids_BT):
    with pytest.raises(ValueError, match="labels"):
        model(ids_BT)


@settings(max_examples=20, deadline=None)
@given(row=st.integers(0, 5), pads=st.integers(0, 9))
def test_a_code_depends_neither_on_padding_nor_on_the_rest_of_the_batch(model, ids_BT, row, pads):
    length = int((ids_BT[row] != 0).sum())
    alone = ids_BT[row : row + 1, : length + pads]
    close(model(alone, mode="encode"), model(ids_BT, mode="encode")[row : row + 1])


def test_an_explicit_attention_mask_is_what_ids_other_than_pad_would_give(model, ids_BT):
    mask_BT = (ids_BT != 0).long()
    close(model(ids_BT, attention_mask=mask_BT, mode="encode"), model(ids_BT, mode="encode"))
    masked = model(ids_BT, attention_mask=mask_BT * (torch.arange(9) < 1), mode="encode")
    close(masked, model(ids_BT[:, :1], mode="encode"))


def test_cross_entropy_of_a_row_does_not_depend_on_padding(model, ids_BT):
    whole = model(ids_BT, mode="score").nll
    for row, nll in zip(ids_BT, whole, strict=True):
        alone = model(row[row != 0][None], mode="score")
        torch.testing.assert_close(alone.nll[0], nll, rtol=1e-6, atol=1e-6)


def test_cross_entropy_is_that_of_the_logits(model, ids_BT, z_BD):
    output = model(latent=z_BD[: len(ids_BT)], labels=ids_BT, mode="score")
    logits = model(latent=z_BD[: len(ids_BT)], labels=ids_BT).logits.detach().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    expected = [
        -sum(log_p[b, t, token] for t, token in enumerate(row) if token)
        for b, row in enumerate(ids_BT.tolist())
    ]
    np.testing.assert_allclose(output.nll.detach(), expected, rtol=1e-6)
    tokens = int((ids_BT != 0).sum())
    np.testing.assert_allclose(output.loss.item(), sum(expected) / tokens, rtol=1e-6)
    assert output.logits is None


def test_score_without_labels_scores_the_input(model, ids_BT):
    given = model(ids_BT, labels=ids_BT, mode="score")
    close(model(ids_BT, mode="score").nll, given.nll)


def test_gradient_of_the_score_is_that_of_the_logits(model, ids_BT):
    parameter = next(model.bottleneck.parameters())
    (scored,) = torch.autograd.grad(model(ids_BT, mode="score").nll.sum(), parameter)
    logits_BTV = model(ids_BT, labels=ids_BT).logits
    loss = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1), ids_BT.flatten(), ignore_index=0, reduction="sum"
    )
    (expected,) = torch.autograd.grad(loss, parameter)
    torch.testing.assert_close(scored, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["t5", "t5-v1.1", "mt5", "umt5"])
@pytest.mark.parametrize("bottleneck", ["flatten", "attention"])
def test_logits_are_those_of_transformers_t5_on_the_memory(build, ids_BT, bottleneck, architecture):
    model = build(architecture, bottleneck=bottleneck)
    output = model(ids_BT, labels=ids_BT)
    memory = BaseModelOutput(last_hidden_state=model(latent=output.latent, mode="expand"))
    shifted = torch.cat([torch.zeros_like(ids_BT[:, :1]), ids_BT[:, :-1]], dim=1)
    # T5 tells the scale by this, where transformers forces all embeddings to be tied.
    model.t5.config.scale_decoder_outputs = model.config.tie_word_embeddings
    expected = model.t5(encoder_outputs=memory, decoder_input_ids=shifted).logits
    if architecture == "umt5" and Version(transformers.__version__) < Version("5.24"):
        # published UMT5 has no scale, which transformers gave it for a while
        expected = expected * model.t5.config.d_model**0.5
    close(output.logits, expected)


def test_labels_may_be_padded_with_minus_100_too(model, ids_BT):
    padded = model(ids_BT, labels=ids_BT.masked_fill(ids_BT == 0, -100), mode="score")
    plain = model(ids_BT, labels=ids_BT, mode="score")
    assert torch.equal(padded.nll, plain.nll)
    assert torch.equal(padded.loss, plain.loss)


def test_the_loss_of_no_tokens_is_zero(model, ids_BT):
    assert model(ids_BT, labels=torch.full_like(ids_BT, -100), mode="score").loss == 0


def test_eager_and_fused_attention_give_the_same(build, ids_BT):
    model = build(bottleneck="attention")
    assert model.t5.config._attn_implementation == "sdpa"
    fused = model(ids_BT, mode="score").nll
    model.t5.set_attn_implementation("eager")
    close(model(ids_BT, mode="score").nll, fused)


@pytest.mark.parametrize("mask_padding", [True, False], ids=["masked", "legacy"])
@pytest.mark.parametrize("mode", ["encode", "score"])
def test_a_sequence_too_long_for_flatten_is_a_value_error(build, mask_padding, mode):
    model = build(bottleneck="flatten", mask_padding=mask_padding)
    long = model.config.sequence_length + 1
    ids = torch.full((2, long), 5)
    with pytest.raises(ValueError, match=f"{long} tokens"):
        model(ids, mode=mode)


def test_attention_encodes_sequences_longer_than_any_in_training(build):
    model = build(bottleneck="attention")
    assert model(torch.full((2, 40), 5), mode="encode").isfinite().all()


def test_on_latent_is_called_once_with_the_code_before_the_decoder_runs(model, ids_BT):
    events = []
    end = model.t5.decoder.final_layer_norm
    hook = end.register_forward_pre_hook(lambda *_: events.append("decoder"))
    try:
        output = model(ids_BT, mode="score", on_latent=lambda z: events.append(z))
    finally:
        hook.remove()
    assert len(events) == 2
    assert events[0] is output.latent
    assert events[0].requires_grad
    assert events[1] == "decoder"
    close(events[0], model(ids_BT, mode="encode"))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_recomputes_layers_only_and_changes_no_gradient(build, ids_BT):
    gradients = []
    for checkpointed in (False, True):
        model = build(bottleneck="flatten").train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        calls, layers = [], []
        for stack in (model.t5.encoder, model.t5.decoder):
            norm = stack.block[0].layer[0].layer_norm
            norm.register_forward_pre_hook(lambda *_, layers=layers: layers.append(1))
        model(ids_BT, mode="score", on_latent=calls.append).loss.backward()
        assert len(calls) == 1  # a second call would gather the codes again
        assert len(layers) == (4 if checkpointed else 2)
        assert all(p.grad is not None for p in model.parameters())
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        close(checkpointed, plain)


@torch.no_grad()
def test_bf16_scores_in_fp32_and_close_to_fp64(build, ids_BT):
    for bottleneck in ("flatten", "attention"):
        model = build(bottleneck=bottleneck)
        exact = model(ids_BT, mode="score").nll
        rough = build(bottleneck=bottleneck).bfloat16()(ids_BT, mode="score").nll
        assert rough.dtype == torch.float32
        torch.testing.assert_close(rough, exact.float(), rtol=0.05, atol=0.05)


def test_no_parameter_lies_outside_a_submodule(model):
    # Under ZeRO-3 a bare parameter of the top module would not be gathered.
    assert not list(model.parameters(recurse=False))


def test_tanh_bounds_the_code(build, ids_BT):
    model = build(bottleneck="flatten")
    bounded = build(bottleneck="flatten", squash="tanh")
    close(bounded(ids_BT, mode="encode"), model(ids_BT, mode="encode").tanh())
    wider = build(bottleneck="flatten", squash="tanh", squash_scale=3.0)
    close(wider(ids_BT, mode="encode"), 3 * (model(ids_BT, mode="encode") / 3).tanh())


@pytest.mark.parametrize("bottleneck", ["flatten", "attention"])
def test_normalised_codes_have_the_direction_of_the_others_and_norm_sqrt_of_d(
    build, ids_BT, bottleneck
):
    plain_BD = build(bottleneck=bottleneck)(ids_BT, mode="encode")
    z_BD = build(bottleneck=bottleneck, normalize=True)(ids_BT, mode="encode")
    assert z_BD.dtype == plain_BD.dtype
    expected_BD = plain_BD / plain_BD.norm(dim=1, keepdim=True) * plain_BD.shape[1] ** 0.5
    torch.testing.assert_close(z_BD, expected_BD, rtol=1e-5, atol=1e-6)
