"""T5VAE: a T5 whose encoding of a sequence is squeezed through one latent code.

Shapes: B sequences, T tokens, D latent size, M memory length, C model width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForSeq2SeqLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from t5vae.model.bottleneck import BOTTLENECKS, SQUASHES
from t5vae.model.configuration import T5VAEConfig
from t5vae.model.noise import keyed_normal, keyed_uniform

NOISE, ENCODER_MASK, WORD_DROPOUT = range(3)


@dataclass
class Regularisers:
    """Training-time noise, keyed by row so that it does not depend on the split over ranks.

    Attributes:
        keys_B: int64 [B], from `t5vae.model.noise.row_keys`.
        latent_noise: standard deviation of the Gaussian added to the code.
        input_mask: probability that an encoder input token is replaced by the unknown token.
        word_dropout: the same for the decoder's inputs, its start token apart.
        unk: the id that stands in for a dropped token.
    """

    keys_B: Tensor
    latent_noise: float = 0.0
    input_mask: float = 0.0
    word_dropout: float = 0.0
    unk: int = 2

    def drop_tokens(self, ids_BT: Tensor, rate: float, stream: int) -> Tensor:
        if not rate:
            return ids_BT
        dropped = keyed_uniform(self.keys_B, ids_BT.shape[1], stream) < rate
        return torch.where(dropped & (ids_BT > 1), self.unk, ids_BT)


@dataclass
class T5VAEOutput(ModelOutput):
    """What a T5VAE returns.

    Attributes:
        loss: mean cross-entropy per real token in nats, where labels were given.
        nll: float32 [B], summed cross-entropy of each row in nats, where labels were given.
        logits: [B, T, V], where decoder inputs were given.
        latent: [B, D], the code that was encoded or given, without noise.
        past_key_values: the decoder's cache.
    """

    loss: Tensor | None = None
    nll: Tensor | None = None
    logits: Tensor | None = None
    latent: Tensor | None = None
    past_key_values: Any = None


class T5VAE(PreTrainedModel, GenerationMixin):
    """A transformers model: `save_pretrained`, `from_pretrained`, `generate(latent=z)`."""

    config_class = T5VAEConfig
    base_model_prefix = "t5vae"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: T5VAEConfig):
        super().__init__(config)
        self.t5 = AutoModelForSeq2SeqLM.from_config(config.t5_config)
        self.bottleneck = BOTTLENECKS[config.bottleneck](config)
        self.squash = SQUASHES[config.squash]
        self.post_init()
        ids = config.t5_config
        self.generation_config.update(
            pad_token_id=ids.pad_token_id,
            eos_token_id=ids.eos_token_id,
            decoder_start_token_id=ids.pad_token_id,
            max_length=config.sequence_length + 1,
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Keep torch's own initialisation of the bottleneck; the T5 inside has its own."""

    def get_input_embeddings(self) -> nn.Module:
        return self.t5.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.t5.lm_head

    def get_encoder(self, *_: Any, **__: Any) -> nn.Module:
        return self.t5.encoder

    def get_decoder(self) -> nn.Module:
        return self.t5.decoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        latent: Tensor | None = None,
        *,
        mode: str = "decode",
        regularisers: Regularisers | None = None,
        on_latent: Callable[[Tensor], None] | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> T5VAEOutput | Tensor:
        """Every entry point, so that parameters sharded by ZeRO-3 are gathered.

        Args:
            input_ids: int64 [B, T], pad 0, ending in the end token.
            attention_mask: [B, T]; default `input_ids != pad`.
            labels: int64 [B, T], pad 0: the sequences to score.
            latent: [B, D], decoded instead of the encoding of `input_ids`.
            mode: "encode" returns z [B, D]; "expand" turns `latent` into the decoder's memory
                [B, M, C]; "score" returns the cross-entropy of `labels` (default `input_ids`)
                given the code, without ever storing the logits of pads; "decode" returns logits
                for `decoder_input_ids`, or for `labels` shifted right.
            regularisers: training-time noise; None for none.
            on_latent: called with z [B, D] as soon as it is known.
            decoder_input_ids, encoder_outputs, past_key_values, use_cache: as in transformers'
                encoder-decoder models; `encoder_outputs` holds the expanded memory.

        Raises:
            ValueError: for an unknown mode, or a sequence longer than a "flatten" bottleneck.
        """
        if mode == "encode":
            return self._encode(input_ids, attention_mask, regularisers)
        if mode == "expand":
            return self.bottleneck.expand(latent)
        if mode not in ("score", "decode"):
            raise ValueError(f"mode is {mode!r}; choose encode, expand, score or decode")

        if encoder_outputs is None:
            if latent is None:
                latent = self._encode(input_ids, attention_mask, regularisers)
            if on_latent is not None:
                on_latent(latent)
            z_BD = latent
            if regularisers is not None and regularisers.latent_noise:
                noise_BD = keyed_normal(regularisers.keys_B, z_BD.shape[1], NOISE)
                z_BD = z_BD + regularisers.latent_noise * noise_BD.to(z_BD.dtype)
            memory_BMC = self.bottleneck.expand(z_BD)
        else:
            memory_BMC = encoder_outputs[0]

        if mode == "score" and labels is None:
            labels = input_ids
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("decoding needs labels or decoder_input_ids")
            decoder_input_ids = nn.functional.pad(labels[:, :-1], (1, 0))
            if regularisers is not None:
                decoder_input_ids = regularisers.drop_tokens(
                    decoder_input_ids, regularisers.word_dropout, WORD_DROPOUT
                )

        decoded = self.t5.decoder(
            input_ids=decoder_input_ids,
            encoder_hidden_states=memory_BMC,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        states_BTC = decoded.last_hidden_state
        if mode == "score":
            assert labels is not None
            nll_B = self._nll(states_BTC, labels)
            loss = nll_B.sum() / labels.ne(self.pad).sum()
            return T5VAEOutput(loss=loss, nll=nll_B, latent=latent)
        return T5VAEOutput(
            logits=self._logits(states_BTC),
            latent=latent,
            past_key_values=decoded.past_key_values,
        )

    @property
    def pad(self) -> int:
        return self.t5.config.pad_token_id

    def _encode(
        self, ids_BT: Tensor, mask_BT: Tensor | None, regularisers: Regularisers | None
    ) -> Tensor:
        if not self.config.mask_padding:
            # A negative pad would cut the sequence that the bottleneck must refuse.
            short = max(0, self.config.sequence_length - ids_BT.shape[1])
            ids_BT = nn.functional.pad(ids_BT, (0, short), value=self.pad)
            mask_BT = torch.ones_like(ids_BT)
        elif mask_BT is None:
            mask_BT = (ids_BT != self.pad).long()
        if regularisers is not None:
            ids_BT = regularisers.drop_tokens(ids_BT, regularisers.input_mask, ENCODER_MASK)
        states_BTC = self.t5.encoder(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        z_BD = self.squash(self.bottleneck.compress(states_BTC, mask_BT))
        if self.config.normalize:
            z_BD = nn.functional.normalize(z_BD.float(), dim=1) * z_BD.shape[1] ** 0.5
        return z_BD.to(states_BTC.dtype)

    def _logits(self, states: Tensor) -> Tensor:
        if getattr(self.t5.config, "scale_decoder_outputs", True):
            states = states * self.t5.config.d_model**-0.5
        return self.t5.lm_head(states)

    def _nll(self, states_BTC: Tensor, labels_BT: Tensor) -> Tensor:
        """Summed cross-entropy [B] of each row; logits are made for real tokens alone."""
        real_BT = labels_BT != self.pad
        logits = self._logits(states_BTC[real_BT])
        token_nll = cross_entropy(logits.float(), labels_BT[real_BT], reduction="none")
        nll_BT = torch.zeros(real_BT.shape, dtype=torch.float32, device=logits.device)
        return nll_BT.masked_scatter(real_BT, token_nll).sum(1)

    def generate(self, inputs: Tensor | None = None, *, latent: Tensor | None = None, **kwargs):
        """transformers' `generate` from a code [B, D], or from sequences [B, T] to reconstruct.

        Returns:
            int64 [B, <= sequence_length + 1]: the decoder's start token, then the sequence.
        """
        if latent is None and "encoder_outputs" not in kwargs:
            ids_BT = kwargs.pop("input_ids", inputs)
            latent = self(ids_BT, kwargs.pop("attention_mask", None), mode="encode")
        if latent is not None:
            memory_BMC = self(latent=latent.to(self.dtype), mode="expand")
            kwargs["encoder_outputs"] = BaseModelOutput(last_hidden_state=memory_BMC)
        return super().generate(**kwargs)


AutoModel.register(T5VAEConfig, T5VAE)
