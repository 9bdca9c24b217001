"""What a forward pass keeps for the backward pass, in bytes, without computing anything.

Shapes: B rows, T tokens, C model width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from t5vae.model import T5VAE, T5VAEConfig


@dataclass(frozen=True)
class Affine:
    """Bytes that grow with the rows of a batch."""

    constant: float
    per_row: float

    def at(self, rows: int) -> int:
        return round(self.constant + self.per_row * rows)

    @classmethod
    def through(cls, first: tuple[int, float], second: tuple[int, float]) -> "Affine":
        """The line through two (rows, bytes)."""
        per_row = (second[1] - first[1]) / (second[0] - first[0])
        return cls(first[1] - per_row * first[0], per_row)


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward and a backward pass need for sequences of one length.

    Attributes:
        saved: by the forward pass, for the backward pass; apart from logits.
        recomputed: by the backward pass for one layer at a time, where layers are checkpointed.
        logits: by the cross-entropy, where it needs most, before any layer is computed again.
    """

    saved: Affine
    recomputed: Affine
    logits: Affine

    def at(self, rows: int) -> int:
        """The most that there is at once."""
        return self.saved.at(rows) + max(self.recomputed.at(rows), self.logits.at(rows))


def activations(
    config: T5VAEConfig,
    length: int,
    dtype: torch.dtype,
    *,
    checkpointing: bool = False,
    fused_cross_entropy: bool = False,
) -> Activations:
    """Count what training a model keeps, from its own forward pass on the meta device.

    Attention weights are counted as torch's plain attention keeps them; kernels that do not keep
    them need less. For a token and piece of the vocabulary the cross-entropy needs three fp32
    numbers: the log-softmax, its gradient, and that of the logits; fused, none of these.

    Args:
        length: T.
        dtype: of the weights.
        checkpointing: layers keep their inputs alone, and compute the rest again.
    """
    t5 = config.t5_config
    logits = 0 if fused_cross_entropy else 12 * length * t5.vocab_size
    every = Affine.through(*((rows, _saved(config, rows, length, dtype)) for rows in (2, 4)))
    if not checkpointing:
        return Activations(every, Affine(0, 0), Affine(0, logits))
    layers = t5.num_layers + t5.num_decoder_layers
    outside = Affine.through(
        *((rows, _saved(config, rows, length, dtype, checkpointing=True)) for rows in (2, 4))
    )
    inputs = layers * length * t5.d_model * dtype.itemsize
    return Activations(
        saved=Affine(outside.constant, outside.per_row + inputs),
        recomputed=Affine(
            (every.constant - outside.constant) / layers, (every.per_row - outside.per_row) / layers
        ),
        logits=Affine(0, logits),
    )


def _saved(
    config: T5VAEConfig, rows: int, length: int, dtype: torch.dtype, *, checkpointing: bool = False
) -> int:
    """Bytes of all that autograd saves, weights and logits apart; each storage once."""
    with torch.device("meta"):
        model = T5VAE(config).to(dtype).train()
        ids_BT = torch.ones(rows, length, dtype=torch.long)
        mask_B1TT = torch.zeros(rows, 1, length, length, dtype=dtype)
    model.set_attn_implementation("eager")
    if checkpointing:
        model.gradient_checkpointing_enable()
    seen = {weight.untyped_storage()._cdata for weight in model.parameters()}
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept.append(storage)  # alive, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _forward(model, ids_BT, mask_B1TT)
    return sum(storage.nbytes() for storage in kept)


def _forward(model: T5VAE, ids_BT: Tensor, mask_B1TT: Tensor) -> Tensor:
    """The model's pass from ids to the decoder's states, of which the output layer keeps a copy.

    `T5VAE.forward` looks at the values of its mask and labels, which do not exist here.
    """
    states_BTC = model.t5.encoder(input_ids=ids_BT, attention_mask=mask_B1TT).last_hidden_state
    latent_BD, _ = model.compress(states_BTC, torch.ones_like(ids_BT), ids_BT[:, 0])
    memory_BMC = model.bottleneck.expand(latent_BD)
    decoded = model.t5.decoder(input_ids=ids_BT, encoder_hidden_states=memory_BMC, use_cache=False)
    return model.t5.lm_head(decoded.last_hidden_state)
