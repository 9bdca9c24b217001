"""What `latent.py` times: ways to encode and decode, and the operations that these need.

Shapes: N lines, B lines of a batch, T tokens, M memory, C model width, D latent size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import _model_work as work
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_outputs import BaseModelOutput

from t5vae.latent import LatentSpace
from t5vae.model import T5VAE, T5VAEConfig
from t5vae.model.modeling import CACHE

# The ways


def encode_plain(space: LatentSpace, texts: list[str]) -> Tensor:
    codes = []
    for at in range(0, len(texts), space.batch_size):
        rows = texts[at : at + space.batch_size]
        batch = space.tokenizer(rows, padding=True, return_tensors="pt").to(space.model.device)
        codes.append(space.model(batch["input_ids"], batch["attention_mask"], mode="encode").cpu())
    return torch.cat(codes)


def encode_original(space: LatentSpace, texts: list[str]) -> Tensor:
    how = {"padding": "max_length", "max_length": space.model.config.sequence_length}
    codes = []
    for text in texts:
        row = space.tokenizer(text, return_tensors="pt", **how).to(space.model.device)
        codes.append(space.model(row["input_ids"], row["attention_mask"], mode="encode").cpu())
    return torch.cat(codes)


def decode_plain(space: LatentSpace, z_ND: Tensor) -> list[str]:
    texts = []
    for z_BD in z_ND.split(space.batch_size):
        ids_BT = space.model.generate(latent=z_BD.to(space.model.device), do_sample=False)
        texts += space.tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
    return texts


def decode_original(space: LatentSpace, z_ND: Tensor) -> list[str]:
    rows = [
        work.decode_original(space.model, z_1D.to(space.model.device))[0] for z_1D in z_ND.split(1)
    ]
    return [space.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


# Operations


class Operations(NamedTuple):
    """Those of matrix products, by tokens."""

    encode_T: np.ndarray
    """To encode a line of 1, 2, ... tokens without pads."""
    expand: int
    """Of a code."""
    step_T: np.ndarray
    """To decode the first, second, ... token with a cache."""


@torch.no_grad()
def count_operations(config: T5VAEConfig) -> Operations:
    """As torch counts them; not in the model that is timed, as its fused attention is not counted
    everywhere."""
    model = T5VAE(config).eval()
    model.t5.set_attn_implementation("eager")
    ids_1T = torch.full((1, config.sequence_length), model.end)

    def counted(run: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[int, Any]:
        with FlopCounterMode(display=False) as counter:
            found = run(*args, **kwargs)
        return counter.get_total_flops(), found

    lengths = range(1, config.sequence_length + 1)
    encode = [counted(model, ids_1T[:, :length], mode="encode")[0] for length in lengths]
    z_1D = torch.zeros(1, config.latent_size)
    expand, memory_1MC = counted(model, latent=z_1D, mode="expand")
    memory, cache, steps = BaseModelOutput(last_hidden_state=memory_1MC), None, []
    for _ in lengths:
        step, output = counted(
            model,
            encoder_outputs=memory,
            decoder_input_ids=ids_1T[:, :1],
            cache=cache,
            use_cache=True,
        )
        cache = output[CACHE]
        steps.append(step)
    return Operations(np.array(encode), expand, np.array(steps))


@contextmanager
def steps_of(decoder: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """Rows, and tokens in the cache, of each call of a decoder."""
    steps: list[tuple[int, int]] = []

    def note(_: nn.Module, __: tuple, kwargs: dict) -> None:
        cache = kwargs.get(CACHE)
        steps.append((len(kwargs["input_ids"]), cache.get_seq_length() if cache else 0))

    hook = decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield steps
    finally:
        hook.remove()
