from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from t5vae.model import T5VAE


@pytest.fixture(scope="session")
def build_talker(build: Callable[..., T5VAE]) -> Callable[..., T5VAE]:
    """A model whose random weights speak: it listens to its code, does not repeat its last token
    as random tied embeddings do, and sometimes ends early."""

    def build_model(**config) -> T5VAE:
        model = build("t5-v1.1", **config)
        head = torch.randn_like(model.get_output_embeddings().weight)
        head[1] *= 1.5
        model.get_output_embeddings().weight = torch.nn.Parameter(head)
        with torch.no_grad():
            for block in model.t5.decoder.block:
                block.layer[1].EncDecAttention.o.weight *= 8
        return model

    return build_model


@pytest.fixture(scope="session", params=["flatten", "attention"])
def model(request: pytest.FixtureRequest, build_talker: Callable[..., T5VAE]) -> T5VAE:
    return build_talker(bottleneck=request.param)


def greedy(model, **inputs) -> Tensor:
    """Generated ids, padded to T + 1."""
    ids_BT = model.generate(**inputs, do_sample=False)
    longest = model.config.sequence_length + 1
    assert ids_BT.shape[1] <= longest
    assert (ids_BT[:, 0] == 0).all()
    return torch.nn.functional.pad(ids_BT, (0, longest - ids_BT.shape[1]))


def test_greedy_tokens_are_the_argmax_of_teacher_forced_logits(model, z_BD):
    ids_BT = greedy(model, latent=z_BD)
    best_BT = model(latent=z_BD, decoder_input_ids=ids_BT[:, :-1]).logits.argmax(-1)
    ended_BT = (ids_BT[:, :-1] == 1).cumsum(1) > 0
    assert torch.equal(ids_BT[:, 1:], best_BT.masked_fill(ended_BT, 0))
    # Else the test would show less than it claims.
    assert 0 < ended_BT[:, -1].sum() < len(ids_BT)
    assert len(ids_BT.unique(dim=0)) > 5


def test_a_row_is_generated_alike_alone_and_in_a_batch(model, z_BD):
    together = greedy(model, latent=z_BD)
    alone = torch.cat([greedy(model, latent=z_D[None]) for z_D in z_BD])
    assert torch.equal(alone, together)


@pytest.mark.slow
def test_one_row_alone_is_generated_as_among_512_in_single_precision(build_talker):
    model = build_talker(bottleneck="attention").float()
    z_BD = 3 * torch.randn(512, 6, generator=torch.Generator().manual_seed(4))
    together = greedy(model, latent=z_BD)
    assert len(together.unique(dim=0)) > 300
    alone = torch.cat([greedy(model, latent=z_1D) for z_1D in z_BD[::16].split(1)])
    assert torch.equal(alone, together[::16])


def test_generating_from_ids_is_generating_from_their_code(model, ids_BT):
    from_code = greedy(model, latent=model(ids_BT, mode="encode"))
    assert torch.equal(greedy(model, input_ids=ids_BT), from_code)
    assert torch.equal(greedy(model, inputs=ids_BT), from_code)
    mask_BT = (ids_BT != 0).long()
    assert torch.equal(greedy(model, input_ids=ids_BT, attention_mask=mask_BT), from_code)


def test_generating_without_a_cache_is_the_same(model, z_BD):
    assert torch.equal(greedy(model, latent=z_BD, use_cache=False), greedy(model, latent=z_BD))


@pytest.mark.parametrize("bottleneck", ["flatten", "attention"])
def test_as_many_beams_as_tokens_find_the_likeliest_sequences(build_talker, z_BD, bottleneck):
    vocabulary, z_BD = 7, z_BD[:5]
    model = build_talker(vocab_size=vocabulary, bottleneck=bottleneck)
    found = model.generate(
        latent=z_BD, num_beams=vocabulary, max_length=3, length_penalty=0.0, do_sample=False
    )
    assert len(found.unique(dim=0)) > 2
    for z_1D, best in zip(z_BD.split(1), found, strict=True):
        scores = {}
        for first, second in product(range(vocabulary), repeat=2):
            ids = torch.tensor([[0, first]])
            log_p = model(latent=z_1D, decoder_input_ids=ids).logits[0].log_softmax(-1)
            if first == 1:
                scores[1,] = log_p[0, 1]
            else:
                scores[first, second] = log_p[0, first] + log_p[1, second]
        likeliest = max(scores, key=scores.__getitem__)
        # After the end transformers' beams hold the end token again where pad is 0.
        assert tuple(best[1:].tolist())[: len(likeliest)] == likeliest


def test_beams_return_several_sequences_a_row_best_first(model, z_BD):
    output = model.generate(
        latent=z_BD,
        num_beams=4,
        num_return_sequences=2,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert len(output.sequences) == 2 * len(z_BD)
    first, second = output.sequences_scores.view(-1, 2).T
    assert (first >= second).all()


def test_sampling_repeats_with_the_seed_and_varies_without(model, z_BD):
    def sample(seed):
        torch.manual_seed(seed)
        ids = model.generate(latent=z_BD, do_sample=True, max_length=6, min_length=6)
        return ids.tolist()

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


def test_a_code_of_another_precision_is_generated_from(model, z_BD):
    assert torch.equal(
        greedy(model, latent=z_BD.float()), greedy(model, latent=z_BD.float().double())
    )
