"""A model called as users of transformers call a T5."""

import inspect

import pytest
import torch
from transformers import T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.fixture(name="labels_BT")
def labels(ids_BT):
    """The sequences, padded as transformers' collators pad labels."""
    return ids_BT.masked_fill(ids_BT == 0, -100)


def mean_cross_entropy(logits_BTV, labels_BT):
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())


def test_labels_give_a_loss_beside_the_logits(model, ids_BT, labels_BT):
    output = model(input_ids=ids_BT, attention_mask=(ids_BT != 0).long(), labels=labels_BT)
    torch.testing.assert_close(
        output.loss.double(), mean_cross_entropy(output.logits, labels_BT), rtol=1e-6, atol=0
    )
    scored = model(ids_BT, mode="score")
    torch.testing.assert_close(output.loss, scored.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(output.nll, scored.nll, rtol=1e-5, atol=1e-6)
    assert model(ids_BT, decoder_input_ids=ids_BT).loss is None


def test_the_loss_of_a_batch_trains_the_whole_model(build, ids_BT, labels_BT):
    model = build().train()
    model(input_ids=ids_BT, labels=labels_BT).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_labels_alone_are_the_input_too(model, ids_BT, labels_BT):
    expected = model(ids_BT, labels=labels_BT)
    for labels in (labels_BT, ids_BT):
        alone = model(labels=labels)
        assert torch.equal(alone.loss, expected.loss)
        assert torch.equal(alone.latent, expected.latent)
    assert torch.equal(model(labels=labels_BT, mode="encode"), expected.latent)
    assert torch.equal(model(labels=labels_BT, mode="score").latent, expected.latent)


def test_labels_beside_a_code_or_a_memory_are_not_encoded(model, labels_BT, z_BD):
    z_BD = z_BD[: len(labels_BT)]
    from_code = model(labels=labels_BT, latent=z_BD)
    assert from_code.latent is z_BD
    memory = (model(latent=z_BD, mode="expand"),)
    close(model(labels=labels_BT, encoder_outputs=memory).logits, from_code.logits)


def test_labels_may_be_of_32_bits(model, ids_BT):
    output = model(ids_BT.int(), labels=ids_BT.int())
    assert torch.equal(output.loss, model(ids_BT, labels=ids_BT).loss)


def test_a_tuple_has_the_loss_first_then_the_logits(model, ids_BT, monkeypatch):
    whole = model(ids_BT, labels=ids_BT)
    loss, logits, latent, *_ = model(ids_BT, labels=ids_BT, return_dict=False)
    assert torch.equal(loss, whole.loss)
    assert torch.equal(logits, whole.logits)
    assert torch.equal(latent, whole.latent)
    assert torch.equal(whole[0], loss)
    monkeypatch.setattr(model.config, "return_dict", False)
    assert torch.equal(model(ids_BT, labels=ids_BT)[1], logits)
    assert torch.equal(model(ids_BT, labels=ids_BT, return_dict=True).logits, logits)
    assert torch.equal(model(ids_BT, decoder_input_ids=ids_BT)[1], latent)
    assert torch.equal(
        model(ids_BT, mode="score")[0], model(ids_BT, mode="score", return_dict=1)[0]
    )


@pytest.mark.parametrize("mode", ["decode", "score"])
def test_hidden_states_are_those_of_the_layers(model, ids_BT, mode):
    output = model(ids_BT, labels=ids_BT, mode=mode, output_hidden_states=True)
    plain = model(ids_BT, labels=ids_BT, mode=mode)
    assert plain.decoder_hidden_states is plain.encoder_hidden_states is None
    torch.testing.assert_close(output.loss, plain.loss, rtol=1e-6, atol=0)
    close(output.latent, plain.latent)
    encoded = model.t5.encoder(ids_BT, (ids_BT != 0).long(), output_hidden_states=True)
    close(output.encoder_hidden_states, encoded.hidden_states)
    close(output.encoder_last_hidden_state, encoded.last_hidden_state)
    memory = BaseModelOutput(last_hidden_state=model(latent=output.latent, mode="expand"))
    t5s = model.t5(encoder_outputs=memory, labels=ids_BT, output_hidden_states=True)
    assert len(output.decoder_hidden_states) == 3
    close(output.decoder_hidden_states, t5s.decoder_hidden_states)


def test_attentions_are_shares_of_tokens_and_memory(build, ids_BT):
    model = build(bottleneck="attention")
    model.set_attn_implementation("eager")
    output = model(ids_BT, labels=ids_BT, output_attentions=True)
    rows, tokens = ids_BT.shape
    memory = model.config.memory_length
    for name, width in (("decoder", tokens), ("cross", memory), ("encoder", tokens)):
        of_layers = output[f"{name}_attentions"]
        assert [layer.shape for layer in of_layers] == [(rows, 4, tokens, width)] * 2
        close(of_layers[0].sum(-1), torch.ones(rows, 4, tokens, dtype=torch.float64))


def test_the_configuration_may_ask_for_hidden_states(build, ids_BT):
    model = build()
    model.config.output_hidden_states = True
    assert len(model(labels=ids_BT).encoder_hidden_states) == 3
    assert model(labels=ids_BT, output_hidden_states=False).encoder_hidden_states is None


def test_a_posteriors_parameters_are_beside_the_logits(build, ids_BT):
    model = build(posterior="gaussian")
    output, scored = model(labels=ids_BT), model(ids_BT, mode="score")
    assert torch.equal(output.mean, scored.mean)
    assert torch.equal(output.log_variance, scored.log_variance)
    assert torch.equal(scored["latent"], scored.latent)


def test_arguments_have_t5s_order(model, ids_BT):
    ours = list(inspect.signature(type(model).forward).parameters)
    t5s = list(inspect.signature(T5ForConditionalGeneration.forward).parameters)
    count = t5s.index("use_cache")  # and a cache has two names
    same = [name for name in t5s[:count] if name not in ("past_key_values", "cache")]
    assert [name for name in ours[:count] if name != "past_key_values"] == same
    shifted = model.prepare_decoder_input_ids_from_labels(ids_BT)
    mask_BT = (ids_BT != 0).long()
    close(model(ids_BT, mask_BT, shifted).logits, model(ids_BT, labels=ids_BT).logits)


def test_a_decoders_mask_hides_tokens(model, ids_BT):
    shifted = model.prepare_decoder_input_ids_from_labels(ids_BT)
    mask_BT = torch.ones_like(shifted)
    mask_BT[:, 2] = 0
    masked = model(ids_BT, decoder_input_ids=shifted, decoder_attention_mask=mask_BT).logits
    other = shifted.clone()
    other[:, 2] = 7
    with_another = model(ids_BT, decoder_input_ids=other, decoder_attention_mask=mask_BT).logits
    close(masked[:, 3:], with_another[:, 3:])
    assert not torch.allclose(masked[0, 3:], model(ids_BT, labels=ids_BT).logits[0, 3:])


def test_labels_shifted_are_those_of_t5(model, labels_BT):
    assert torch.equal(
        model.prepare_decoder_input_ids_from_labels(labels_BT),
        model.t5.prepare_decoder_input_ids_from_labels(labels_BT),
    )


def test_embeddings_stand_in_for_ids(model, ids_BT):
    embed, mask_BT = model.get_input_embeddings(), (ids_BT != 0).long()
    whole = model(ids_BT, labels=ids_BT)
    given = {"inputs_embeds": embed(ids_BT), "attention_mask": mask_BT}
    close(model(**given, labels=ids_BT).logits, whole.logits)
    close(model(**given, mode="encode"), whole.latent)
    shifted = model.prepare_decoder_input_ids_from_labels(ids_BT)
    inputs = embed(shifted)
    close(model(ids_BT, decoder_inputs_embeds=inputs, labels=ids_BT).loss, whole.loss)
    kept = {"do_sample": False, "max_length": 6}
    generated = model.generate(**given, **kept)
    assert torch.equal(generated, model.generate(ids_BT, **kept))
    assert torch.equal(model(**given, mode="reconstruct", **kept), generated)


def test_a_model_that_encodes_pads_takes_embeddings_of_all_tokens(build, ids_BT):
    model = build(bottleneck="flatten", mask_padding=False)
    embedded_BTC = model.get_input_embeddings()(ids_BT)
    close(model(inputs_embeds=embedded_BTC, mode="encode"), model(ids_BT, mode="encode"))
    with pytest.raises(ValueError, match=r"has 4 tokens.* give all 9"):
        model(inputs_embeds=embedded_BTC[:, :4], mode="encode")


@pytest.mark.parametrize("name", ["lables", "output_hidden_state", "num_items_in_batch"])
@pytest.mark.parametrize("mode", ["encode", "score", "decode"])
def test_an_unknown_argument_is_a_type_error(model, ids_BT, name, mode):
    with pytest.raises(TypeError, match=f"no argument '{name}'"):
        model(ids_BT, mode=mode, **{name: ids_BT})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "either input_ids or inputs_embeds"),
        (("input_ids", "inputs_embeds", "labels"), "either input_ids or inputs_embeds"),
        (("input_ids",), "labels or decoder_input_ids"),
        (("row",), r"input_ids has the shape \[9\]; give \[B, T\]"),
        (("input_ids", "short"), r"labels has the shape \[6, 9\], the decoder's input \[6, 4\]"),
    ],
)
def test_what_cannot_be_computed_is_a_value_error(model, ids_BT, given, message):
    every = {
        "input_ids": {"input_ids": ids_BT},
        "inputs_embeds": {"inputs_embeds": model.get_input_embeddings()(ids_BT)},
        "labels": {"labels": ids_BT},
        "row": {"input_ids": ids_BT[0]},
        "short": {"labels": ids_BT, "decoder_input_ids": ids_BT[:, :4]},
    }
    with pytest.raises(ValueError, match=message):
        model(**{key: value for name in given for key, value in every[name].items()})


@pytest.mark.parametrize(("mode", "message"), [("expand", "latent"), ("encode", "input_ids")])
def test_a_mode_without_its_input_is_a_value_error(model, mode, message):
    with pytest.raises(ValueError, match=message):
        model(mode=mode)


def test_scoring_a_code_needs_labels(model, z_BD):
    with pytest.raises(ValueError, match="labels or input_ids"):
        model(latent=z_BD, mode="score")
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model.generate()


def test_generating_returns_what_is_asked_for(build, ids_BT):
    model = build()
    model.set_attn_implementation("eager")
    asked = ("scores", "logits", "hidden_states", "attentions")
    output = model.generate(
        ids_BT,
        do_sample=False,
        return_dict_in_generate=True,
        **{f"output_{name}": True for name in asked},
    )
    steps = output.sequences.shape[1] - 1
    for name in ("scores", "decoder_hidden_states", "decoder_attentions", "cross_attentions"):
        assert len(output[name]) == steps, name
    assert torch.equal(output.logits[0].argmax(-1), output.sequences[:, 1])


def test_half_precision_has_a_loss_too(build, ids_BT, labels_BT):
    exact = build()(labels=labels_BT).loss
    for dtype in (torch.float16, torch.bfloat16):
        output = build().to(dtype)(input_ids=ids_BT, labels=labels_BT)
        assert output.logits.dtype == output.latent.dtype == dtype
        torch.testing.assert_close(output.loss, exact, rtol=0.05, atol=0, check_dtype=False)


def test_transformers_trainer_divides_the_loss_by_accumulated_batches(model):
    # It hands `num_items_in_batch` to models that take any argument, and divides by it no more.
    assert model.accepts_loss_kwargs is False
