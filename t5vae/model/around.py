"""What transformers asks of a model around a T5: its tokens, embeddings, layers and masks."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.models.t5.modeling_t5 import T5LayerNorm

from t5vae.model.compiling import compile_layers
from t5vae.model.configuration import T5VAEConfig
from t5vae.model.head import Head


class AroundT5(PreTrainedModel):
    """A model whose encoder, decoder, embeddings and output layer are those of `t5`.

    Attributes:
        t5: the T5 inside.
        compiled: whether `compile_layers` was called.
    """

    config_class = T5VAEConfig
    base_model_prefix = "t5vae"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # transformers' Trainer divides the loss by accumulated batches
    _supports_sdpa = True

    t5: PreTrainedModel
    compiled = False

    def _init_weights(self, module: nn.Module) -> None:
        """torch's own initialisation, for the bottleneck; the T5 inside has its own."""
        for name in ("reset_parameters", "_reset_parameters"):
            if hasattr(module, name):
                getattr(module, name)()
        if isinstance(module, T5LayerNorm):
            init.ones_(module.weight)

    @property
    def pad(self) -> int:
        return self.t5.config.pad_token_id

    @property
    def start(self) -> int:
        start = getattr(self.t5.config, "decoder_start_token_id", None)
        return self.pad if start is None else start

    @property
    def end(self) -> int:
        return self.t5.config.eos_token_id

    def get_input_embeddings(self) -> nn.Module:
        return self.t5.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.t5.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.t5.lm_head = Head(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As in transformers, and remembered in `config`."""
        embeddings = self.t5.resize_token_embeddings(*args, **kwargs)
        self.set_output_embeddings(self.t5.lm_head)
        self.config.t5["vocab_size"] = embeddings.num_embeddings
        return embeddings

    def get_encoder(self, *_: Any, **__: Any) -> nn.Module:
        return self.t5.encoder

    def get_decoder(self) -> nn.Module:
        return self.t5.decoder

    def compile_layers(self) -> None:
        """torch.compile every layer, in place; see `t5vae.model.compiling`."""
        self.compiled = True
        for stack in (self.t5.encoder, self.t5.decoder):
            compile_layers(stack)

    def _encoder_mask(self, mask_BT: Tensor, places_N: Tensor | None) -> Tensor | None:
        """The mask as transformers takes it; one of [B, T] it asks whether it hides anything."""
        if places_N is None:
            return mask_BT
        if len(places_N) == mask_BT.numel():
            return None
        least = torch.finfo(self.t5.encoder.dtype).min
        added_BT = torch.zeros_like(mask_BT, dtype=self.t5.encoder.dtype)
        return added_BT.masked_fill(mask_BT == 0, least)[:, None, None, :]
