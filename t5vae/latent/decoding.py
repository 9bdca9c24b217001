"""Decoding: from codes to token ids, step by step, for the rows that have not ended.

Shapes: N codes, B rows that are computed, T tokens, D latent size, M memory length, C model width,
V vocabulary.
"""

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from t5vae.latent.threads import Threads
from t5vae.model import T5VAE
from t5vae.model.modeling import CACHE

COMPACT = 0.75
"""Ended rows are left out once at most this share of the rows goes on, since that copies the
cache."""


@torch.no_grad()
def decode(
    model: T5VAE,
    z_ND: Tensor,
    temperature: float = 0.0,
    chances_NT: Tensor | None = None,
    threads: Threads | None = None,
) -> Tensor:
    """The tokens of codes, all in one batch.

    Greedily they are those of transformers' `generate`, which computes ended rows until the last
    one has ended.

    Args:
        model: in evaluation mode.
        z_ND: [N, D], N > 0, in the model's dtype, on its device.
        temperature: 0 takes the likeliest token at each step; above 0 draws it from the softmax of
            logits / temperature, in float32.
        chances_NT: of the draws, float32 [N, sequence_length], uniform in [0, 1): a token is drawn
            where the cumulated probabilities exceed its chance.
        threads: chooses how many a step takes on a CPU; few rows take fewer.

    Returns:
        int64 [N, sequence_length] on the model's device; what follows a row's end token is
        undefined.
    """
    threads = threads or Threads()
    with threads("expand", len(z_ND), z_ND.device):
        memory_BMC = model(latent=z_ND, mode="expand")
    ids_NT = torch.full((len(z_ND), model.config.sequence_length), model.pad, device=z_ND.device)
    rows_B = torch.arange(len(z_ND), device=z_ND.device)
    next_B = torch.full_like(rows_B, model.start)
    going_B = torch.ones_like(rows_B, dtype=torch.bool)
    cache = None
    for step in range(ids_NT.shape[1]):
        # The first step is another job: it has the memory's keys and values to make.
        with threads("decode" if step else "begin", len(rows_B), z_ND.device):
            output = model(
                encoder_outputs=BaseModelOutput(last_hidden_state=memory_BMC),
                decoder_input_ids=next_B[:, None],
                cache=cache,
                use_cache=True,
            )
            logits_BV = output.logits[:, -1]
            if chances_NT is None:
                next_B = logits_BV.argmax(-1)
            else:
                next_B = _drawn(logits_BV, temperature, chances_NT[rows_B, step])
            ids_NT[rows_B, step] = next_B
            going_B &= next_B != model.end
            going = int(going_B.sum())
            if not going:
                break
            cache = output[CACHE]
            if going <= COMPACT * len(rows_B):
                kept_B = going_B.nonzero()[:, 0]
                cache.batch_select_indices(kept_B)
                memory_BMC, rows_B, next_B, going_B = (
                    each[kept_B] for each in (memory_BMC, rows_B, next_B, going_B)
                )
    return ids_NT


@torch.no_grad()
def generate(
    model: T5VAE, z_BD: Tensor, beams: int, temperature: float, synced_gpus: bool, seed: int
) -> Tensor:
    """The same by transformers' `generate`, for what `decode` cannot.

    Args:
        model, z_BD, temperature: as in `decode`.
        beams: of a beam search where temperature is 0; all of them are returned.
        synced_gpus: go on until every rank has ended.
        seed: of the draws.

    Returns:
        int64 [B * beams, <= sequence_length], the beams of one code in a row.
    """
    how: dict = {"do_sample": False, "num_beams": beams, "num_return_sequences": beams}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng([z_BD.device] if z_BD.is_cuda else []):
        torch.manual_seed(seed)
        return model.generate(latent=z_BD, synced_gpus=synced_gpus, **how)[:, 1:]


def _drawn(logits_BV: Tensor, temperature: float, chances_B: Tensor) -> Tensor:
    """By inverting the cumulated distribution, several times as fast as torch's multinomial."""
    cumulated_BV = (logits_BV.float() / temperature).softmax(-1).cumsum(-1)
    threshold_B1 = (chances_B * cumulated_BV[:, -1])[:, None]  # rounding: it may not add up to 1
    drawn_B = torch.searchsorted(cumulated_BV, threshold_B1, right=True)[:, 0]
    return drawn_B.clamp(max=logits_BV.shape[1] - 1)
