"""T5VAE: a T5 whose encoding of a sequence is squeezed through one latent code.

Shapes: B sequences, T tokens, D latent size, M memory length, C model width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSeq2SeqLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
)
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.utils import ModelOutput

from t5vae.common.kinds import BOTTLENECKS, find
from t5vae.model.base import load_base
from t5vae.model.bottleneck import Bottleneck
from t5vae.model.configuration import T5VAEConfig
from t5vae.model.head import Head, untie
from t5vae.model.noise import (
    ENCODER_MASK,
    NOISE,
    WORD_DROPOUT,
    Regularisers,
    keyed_normal,
    keyed_uniform,
)
from t5vae.model.packed import Layout, decode, encode
from t5vae.model.posterior import Posterior

MODES = ("encode", "expand", "score", "decode", "reconstruct")
# What this transformers calls a decoder's cache: 5.24 gave it a new name.
CACHE = (
    "cache"
    if "cache" in BaseModelOutputWithPastAndCrossAttentions.__dataclass_fields__
    else "past_key_values"
)


@dataclass
class T5VAEOutput(ModelOutput):
    """What a T5VAE returns.

    Attributes:
        loss: mean cross-entropy per real token in nats, where labels were scored.
        nll: float32 [B], summed cross-entropy of each row in nats, where labels were scored; the
            fused cross-entropy knows `loss` alone.
        logits: [B, T, V], where decoder inputs were given.
        latent: [B, D], the code that was encoded or given, without noise; with a posterior and
            `regularisers` the one that was drawn.
        mean, log_variance: float32 [B, D], of the posterior, where there is one and it was encoded.
        cache, or past_key_values before transformers 5.24: the decoder's cache.
    """

    loss: Tensor | None = None
    nll: Tensor | None = None
    logits: Tensor | None = None
    latent: Tensor | None = None
    mean: Tensor | None = None
    log_variance: Tensor | None = None
    if CACHE == "cache":
        cache: Any = None
    else:
        past_key_values: Any = None


class T5VAE(PreTrainedModel, GenerationMixin):
    """A transformers model: `save_pretrained`, `from_pretrained`, `generate(latent=z)`.

    Args:
        config: of the model.
        t5: the T5 inside with the weights it has; None for random ones.

    Attributes:
        fused_cross_entropy: while gradients are wanted, score by liger-kernel's fused linear
            cross-entropy, for CUDA.
        compiled: whether `compile_layers` was called.
    """

    config_class = T5VAEConfig
    base_model_prefix = "t5vae"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: T5VAEConfig, t5: PreTrainedModel | None = None):
        super().__init__(config)
        self.t5 = AutoModelForSeq2SeqLM.from_config(config.t5_config) if t5 is None else t5
        self.t5.set_attn_implementation(config._attn_implementation)
        if not config.tie_word_embeddings:
            untie(self.t5)
        self.set_output_embeddings(self.t5.lm_head)
        self.bottleneck: Bottleneck = find(BOTTLENECKS, config.bottleneck)(config)
        self.fused_cross_entropy = False
        self.compiled = False
        if t5 is not None:
            for module in t5.modules():
                module._is_hf_initialized = True  # post_init draws the weights of all others
        self.post_init()
        self.generation_config.update(
            pad_token_id=self.pad,
            eos_token_id=self.end,
            decoder_start_token_id=self.start,
            max_length=config.sequence_length + 1,
        )

    def _init_weights(self, module: nn.Module) -> None:
        """torch's own initialisation, for the bottleneck; the T5 inside has its own."""
        for name in ("reset_parameters", "_reset_parameters"):
            if hasattr(module, name):
                getattr(module, name)()
        if isinstance(module, T5LayerNorm):
            init.ones_(module.weight)

    @classmethod
    def from_base(cls, config: T5VAEConfig, base: str) -> "T5VAE":
        """A T5VAE around a pretrained T5; its bottleneck has random weights.

        Args:
            config: whose `t5` is the base's, its vocabulary apart: embeddings are resized to it.
            base: a folder with a transformers model, or a Hugging Face name.

        Raises:
            UserError: if the weights cannot be read, or are not those that `config` describes.
        """
        return cls(config, load_base(base, config))

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
        """torch.compile every layer of the encoder and the decoder, in place.

        By layer and not as a whole, so that equal layers share their compiled code, for any length.
        """
        # All layers are one function to torch, which by default compiles that 8 times at most.
        torch.compiler.config.recompile_limit = 64
        self.compiled = True
        for stack in (self.t5.encoder, self.t5.decoder):
            for block in stack.block:
                block.compile(dynamic=True)

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
        cache: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **generation: Any,
    ) -> T5VAEOutput | Tensor:
        """Every entry point, so that parameters sharded by ZeRO-3 are gathered.

        Args:
            input_ids: int64 [B, T], ending in the end token, then padded.
            attention_mask: [B, T]; default `input_ids != pad`.
            labels: int64 [B, T], padded with pad or -100: the sequences to score.
            latent: [B, D], decoded instead of the encoding of `input_ids`.
            mode: "encode" returns z [B, D]; "expand" turns `latent` into the decoder's memory
                [B, M, C]; "score" returns the cross-entropy of `labels` (default `input_ids`)
                given the code, without ever storing the logits of pads; "decode" returns logits
                for `decoder_input_ids`, or for `labels` shifted right; "reconstruct" returns what
                `generate` makes of `input_ids`.
            regularisers: training-time noise; None for none.
            on_latent: called with z [B, D] as soon as it is known.
            decoder_input_ids, encoder_outputs, use_cache: as in transformers' encoder-decoder
                models; `encoder_outputs` holds the expanded memory.
            cache, past_key_values: one thing, by its new name in transformers and its old one.
            generation: options of `generate`, under "reconstruct". With ZeRO-3 on several ranks
                `synced_gpus=True` is needed.

        Raises:
            ValueError: for an unknown mode, a latent of another shape, or a sequence longer than
                a "flatten" bottleneck.
        """
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; choose {', '.join(MODES[:-1])} or {MODES[-1]}")
        if latent is not None and latent.shape[1:] != (self.config.latent_size,):
            raise ValueError(
                f"latent has the shape {list(latent.shape)}; give [B, {self.config.latent_size}]"
            )
        if mode == "encode":
            return self._encode(input_ids, attention_mask, regularisers)[0]
        if mode == "expand":
            return self.bottleneck.expand(latent)
        if mode == "reconstruct":
            return self.generate(input_ids, attention_mask=attention_mask, **generation)

        posterior = None
        if encoder_outputs is None:
            if latent is None:
                latent, posterior = self._encode(input_ids, attention_mask, regularisers)
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
        if labels is not None:
            labels = labels.masked_fill(labels == -100, self.pad)
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("decoding needs labels or decoder_input_ids")
            decoder_input_ids = nn.functional.pad(labels[:, :-1], (1, 0), value=self.start)
            if regularisers is not None:
                decoder_input_ids = self._drop_tokens(
                    decoder_input_ids, regularisers, regularisers.word_dropout, WORD_DROPOUT
                )

        if mode == "score":
            assert labels is not None
            real_BT = labels != self.pad
            if self._packs(labels):
                # a pad inside a row is context like any other token; those that end it are none
                layout = Layout(real_BT.flip(1).cummax(1).values.flip(1))
                ids_N = layout.pack(decoder_input_ids)
                states_NC = decode(self.t5.decoder, ids_N, layout, memory_BMC)
                scored_N = layout.pack(real_BT)
                if not scored_N.all():
                    states_NC = states_NC[scored_N]
            else:
                states_NC = self._decode(decoder_input_ids, memory_BMC).last_hidden_state[real_BT]
            output = self._score(self._scaled(states_NC), labels, real_BT)
            output.latent = latent
            if posterior is not None:
                output.mean, output.log_variance = posterior
            return output
        cache = past_key_values if cache is None else cache
        decoded = self._decode(decoder_input_ids, memory_BMC, cache, use_cache)
        return T5VAEOutput(
            logits=self.t5.lm_head(self._scaled(decoded.last_hidden_state)),
            latent=latent,
            **{CACHE: decoded.get(CACHE)},
        )

    def _decode(
        self, ids_BT: Tensor, memory_BMC: Tensor, cache: Any = None, use_cache: bool | None = None
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        return self.t5.decoder(
            input_ids=ids_BT,
            encoder_hidden_states=memory_BMC,
            use_cache=bool(use_cache),  # None would fill a cache in every training step
            **{CACHE: cache},
        )

    def _scaled(self, states: Tensor) -> Tensor:
        """The decoder's states as the output layer takes them."""
        return states * states.shape[-1] ** -0.5 if self.config.tie_word_embeddings else states

    def _packs(self, ids_BT: Tensor) -> bool:
        """Whether layers compute real tokens alone, see `t5vae.model.packed`."""
        stack = self.t5.encoder
        return (
            ids_BT.device.type == "cpu"
            and stack.dtype != torch.float16  # which transformers clamps
            and not (stack.gradient_checkpointing or self.compiled)
        )

    def _encode(
        self, ids_BT: Tensor, mask_BT: Tensor | None, regularisers: Regularisers | None
    ) -> tuple[Tensor, Posterior | None]:
        config = self.config
        if not config.mask_padding:
            # A negative pad would cut the sequence that the bottleneck must refuse.
            short = max(0, config.sequence_length - ids_BT.shape[1])
            ids_BT = nn.functional.pad(ids_BT, (0, short), value=self.pad)
            mask_BT = torch.ones_like(ids_BT)
        elif mask_BT is None:
            mask_BT = (ids_BT != self.pad).long()
        if regularisers is not None:
            ids_BT = self._drop_tokens(ids_BT, regularisers, regularisers.input_mask, ENCODER_MASK)
        if self._packs(ids_BT):
            layout = Layout(mask_BT.bool())
            states_BTC = layout.unpack(encode(self.t5.encoder, layout.pack(ids_BT), layout))
        else:
            encoded = self.t5.encoder(input_ids=ids_BT, attention_mask=mask_BT)
            states_BTC = encoded.last_hidden_state
        return self.compress(states_BTC, mask_BT, regularisers.keys_B if regularisers else None)

    def compress(
        self, states_BTC: Tensor, mask_BT: Tensor, keys_B: Tensor | None = None
    ) -> tuple[Tensor, Posterior | None]:
        """The encoder's states to codes [B, D], and what they were drawn from if anything.

        Args:
            states_BTC, mask_BT: the encoder's, and which of them count.
            keys_B: int64 [B], of the draws; None for the means.
        """
        config, posterior = self.config, None
        z_BD = self.bottleneck.compress(states_BTC, mask_BT)
        if config.posterior:
            posterior = Posterior.of(z_BD)
            z_BD = posterior.mean_BD if keys_B is None else posterior.draw(keys_B)
        if config.squash == "tanh":
            z_BD = config.squash_scale * torch.tanh(z_BD / config.squash_scale)
        if config.normalize:
            z_BD = nn.functional.normalize(z_BD.float(), dim=1) * z_BD.shape[1] ** 0.5
        return z_BD.to(states_BTC.dtype), posterior

    def _drop_tokens(
        self, ids_BT: Tensor, regularisers: Regularisers, rate: float, stream: int
    ) -> Tensor:
        if not rate:
            return ids_BT
        dropped_BT = keyed_uniform(regularisers.keys_B, ids_BT.shape[1], stream) < rate
        for special in {self.pad, self.start, self.end}:
            dropped_BT &= ids_BT != special
        return ids_BT.masked_fill(dropped_BT, self.config.unknown_token_id)

    def _score(self, states_NC: Tensor, labels_BT: Tensor, real_BT: Tensor) -> T5VAEOutput:
        """Cross-entropy of the labels that are real, from the states before each of them."""
        labels_N = labels_BT[real_BT]
        tokens = max(1, len(labels_N))
        if self.fused_cross_entropy and torch.is_grad_enabled():
            nll = self.t5.lm_head(states_NC, labels_N, fused=True)
            return T5VAEOutput(loss=nll / tokens)
        nll_N = self.t5.lm_head(states_NC, labels_N)
        nll_BT = torch.zeros(real_BT.shape, dtype=nll_N.dtype, device=nll_N.device)
        nll_B = nll_BT.masked_scatter(real_BT, nll_N).sum(1)
        return T5VAEOutput(loss=nll_B.sum() / tokens, nll=nll_B)

    def generate(self, inputs: Tensor | None = None, *, latent: Tensor | None = None, **kwargs):
        """transformers' `generate` from a code [B, D], or from sequences [B, T] to reconstruct.

        Returns:
            int64 [B, <= sequence_length + 1]: the decoder's start token, then the sequence.
        """
        mask_BT = kwargs.pop("attention_mask", None)
        if latent is None and "encoder_outputs" not in kwargs:
            latent = self(kwargs.pop("input_ids", inputs), mask_BT, mode="encode")
        if latent is not None:
            memory_BMC = self(latent=latent.to(self.dtype), mode="expand")
            kwargs["encoder_outputs"] = BaseModelOutput(last_hidden_state=memory_BMC)
        return super().generate(**kwargs)


AutoModel.register(T5VAEConfig, T5VAE)
