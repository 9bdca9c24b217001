"""T5VAE: a T5 whose encoding of a sequence is squeezed through one latent code.

Shapes: B sequences, T tokens, D latent size, M memory length, C model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForSeq2SeqLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from t5vae.common.kinds import BOTTLENECKS, find
from t5vae.model.around import AroundT5
from t5vae.model.base import load_base
from t5vae.model.bottleneck import Bottleneck
from t5vae.model.configuration import T5VAEConfig
from t5vae.model.head import untie
from t5vae.model.noise import (
    ENCODER_MASK,
    NOISE,
    WORD_DROPOUT,
    Regularisers,
    keyed_normal,
)
from t5vae.model.output import CACHE, T5VAEOutput, losses
from t5vae.model.packed import Layout, decode, encode, places_of
from t5vae.model.posterior import Posterior

MODES = ("encode", "expand", "score", "decode", "reconstruct")


class T5VAE(AroundT5, GenerationMixin):
    """A transformers model: `save_pretrained`, `from_pretrained`, `generate(latent=z)`.

    Args:
        config: of the model.
        t5: the T5 inside with the weights it has; None for random ones.

    Attributes:
        fused_cross_entropy: while gradients are wanted, score by liger-kernel's fused linear
            cross-entropy, for CUDA.
    """

    def __init__(self, config: T5VAEConfig, t5: PreTrainedModel | None = None):
        super().__init__(config)
        self.t5 = AutoModelForSeq2SeqLM.from_config(config.t5_config) if t5 is None else t5
        self.t5.set_attn_implementation(config._attn_implementation)
        if not config.tie_word_embeddings:
            untie(self.t5)
        self.set_output_embeddings(self.t5.lm_head)
        self.bottleneck: Bottleneck = find(BOTTLENECKS, config.bottleneck)(config)
        self.fused_cross_entropy = False
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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        latent: Tensor | None = None,
        mode: str = "decode",
        places: Tensor | None = None,
        regularisers: Regularisers | None = None,
        on_latent: Callable[[Tensor], None] | None = None,
        cache: Any = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **generation: Any,
    ) -> T5VAEOutput | tuple[Any, ...] | Tensor:
        """Every entry point, so that parameters sharded by ZeRO-3 are gathered.

        Args:
            input_ids: int64 [B, T], ending in the end token, then padded.
            attention_mask: [B, T]; default `input_ids != pad`.
            labels: int64 [B, T], padded with pad or -100: the sequences to score. Alone they are
                the input too.
            latent: [B, D], decoded instead of the encoding of `input_ids`.
            mode: "encode" returns z [B, D]; "expand" turns `latent` into the decoder's memory
                [B, M, C]; "score" returns the cross-entropy of `labels` (default `input_ids`)
                given the code, without ever storing the logits of pads; "decode" returns logits
                for `decoder_input_ids`, or for `labels` shifted right, and the cross-entropy of
                `labels`; "reconstruct" returns what `generate` makes of `input_ids`.
            places: int64 [N], where the real tokens of `labels` lie in the flattened [B, T], and
                those of `input_ids`. Default: they are looked for, which on an accelerator makes
                the host wait; with them it waits for nothing in modes "encode" and "score".
            regularisers: training-time noise; None for none.
            on_latent: called with z [B, D] as soon as it is known.
            decoder_input_ids, decoder_attention_mask, encoder_outputs, inputs_embeds,
            decoder_inputs_embeds, use_cache, output_hidden_states, output_attentions, return_dict:
                as in transformers' T5, whose order of arguments this is; `encoder_outputs` holds
                the expanded memory.
            cache, past_key_values: one thing, by its new name in transformers and its old one.
            generation: options of `generate`, under "reconstruct". With ZeRO-3 on several ranks
                `synced_gpus=True` is needed.

        Raises:
            TypeError: for an unknown argument.
            ValueError: for an unknown mode, nothing to encode or decode, ids or a latent of
                another shape, or a sequence longer than a "flatten" bottleneck.
        """
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; choose {', '.join(MODES[:-1])} or {MODES[-1]}")
        if mode == "reconstruct":
            return self.generate(
                input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **generation
            )
        if generation:
            raise TypeError(f"T5VAE has no argument {', '.join(map(repr, generation))}")
        if latent is not None and latent.shape[1:] != (self.config.latent_size,):
            raise ValueError(
                f"latent has the shape {list(latent.shape)}; give [B, {self.config.latent_size}]"
            )
        if mode == "expand":
            if latent is None:
                raise ValueError("expanding needs latent")
            return self.bottleneck.expand(latent)
        if mode == "score" and labels is None:
            if input_ids is None:
                raise ValueError("scoring needs labels or input_ids")
            labels = input_ids
        given = {"input_ids": input_ids, "labels": labels, "decoder_input_ids": decoder_input_ids}
        for name, ids_BT in given.items():
            if ids_BT is not None and ids_BT.dim() != 2:
                raise ValueError(f"{name} has the shape {list(ids_BT.shape)}; give [B, T]")
        if labels is not None:
            labels = labels.long().masked_fill(labels == -100, self.pad)
            if all(it is None for it in (input_ids, inputs_embeds, latent, encoder_outputs)):
                input_ids = labels
        asked = {
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
        }
        layers = {
            name: True
            for name, wanted in asked.items()
            if (getattr(self.config, name) if wanted is None else wanted)
        }
        found: dict[str, Any] = {"latent": latent}
        if mode == "encode" or (latent is None and encoder_outputs is None):
            found = self._encode(
                input_ids, attention_mask, places, regularisers, inputs_embeds, layers
            )
            if mode == "encode":
                return found["latent"]
        if encoder_outputs is None:
            z_BD = found["latent"]
            if on_latent is not None:
                on_latent(z_BD)
            if regularisers is not None and regularisers.latent_noise:
                noise_BD = keyed_normal(regularisers.keys_B, z_BD.shape[1], NOISE)
                z_BD = z_BD + regularisers.latent_noise * noise_BD.to(z_BD.dtype)
            memory_BMC = self.bottleneck.expand(z_BD)
        else:
            memory_BMC = encoder_outputs[0]

        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if labels is None:
                raise ValueError("decoding needs labels or decoder_input_ids")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
            if regularisers is not None:
                decoder_input_ids = self._drop_tokens(
                    decoder_input_ids, regularisers, regularisers.word_dropout, WORD_DROPOUT
                )
        for inputs in (decoder_input_ids, decoder_inputs_embeds):
            if labels is not None and inputs is not None and labels.shape != inputs.shape[:2]:
                raise ValueError(
                    f"labels has the shape {list(labels.shape)}, the decoder's input "
                    f"{list(inputs.shape[:2])}"
                )

        plain = decoder_inputs_embeds is None and decoder_attention_mask is None
        if mode == "score" and plain and not (layers or use_cache) and self._packs(labels):
            states_NC, places_N = self._decode_packed(decoder_input_ids, memory_BMC, labels, places)
            found |= self._score(states_NC, labels, places_N)
        else:
            states, more = self._decode(
                memory_BMC,
                input_ids=decoder_input_ids,
                inputs_embeds=decoder_inputs_embeds,
                attention_mask=decoder_attention_mask,
                use_cache=bool(use_cache),  # None would fill a cache in every training step
                **{CACHE: past_key_values if cache is None else cache},
                **layers,
            )
            found |= more
            if labels is not None and places is None:
                places = places_of(labels != self.pad)
            if mode == "score":
                states_NC = states.flatten(0, 1).index_select(0, places)
                found |= self._score(states_NC, labels, places)
            else:
                found["logits"] = self.t5.lm_head(self._scaled(states))
                if labels is not None:
                    logits_NV = found["logits"].flatten(0, 1)[places].float()
                    nll_N = cross_entropy(logits_NV, labels.flatten()[places], reduction="none")
                    found |= losses(nll_N, places, labels.shape)
        output = T5VAEOutput(**found)
        by_name = self.config.return_dict if return_dict is None else return_dict
        return output if by_name else output.to_tuple()

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Labels shifted right, behind the start token, as transformers' collators ask for them."""
        labels = labels.masked_fill(labels == -100, self.pad)
        return nn.functional.pad(labels[:, :-1], (1, 0), value=self.start)

    def _decode(self, memory_BMC: Tensor, **given: Any) -> tuple[Tensor, dict[str, Any]]:
        """The decoder's states, and what else was asked for, by its name in our output."""
        decoded = self.t5.decoder(encoder_hidden_states=memory_BMC, **given)
        return decoded.last_hidden_state, {
            CACHE: decoded.get(CACHE),
            "decoder_hidden_states": decoded.get("hidden_states"),
            "decoder_attentions": decoded.get("attentions"),
            "cross_attentions": decoded.get("cross_attentions"),
        }

    def _decode_packed(
        self, ids_BT: Tensor, memory_BMC: Tensor, labels_BT: Tensor, places_N: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The decoder's states [R, C], those of the real tokens first, and the places of these."""
        if places_N is not None:
            layout = Layout.at(places_N, labels_BT.shape)
            return decode(self.t5.decoder, layout.pack(ids_BT), layout, memory_BMC), places_N
        real_BT = labels_BT != self.pad
        # a pad inside a row is context like any other token; those that end it are none
        layout = Layout.of(real_BT.flip(1).cummax(1).values.flip(1))
        states_RC = decode(self.t5.decoder, layout.pack(ids_BT), layout, memory_BMC)
        scored_N = layout.pack(real_BT)
        whole = states_RC if scored_N.all() else states_RC[: len(scored_N)][scored_N]
        return whole, places_of(real_BT)

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
        self,
        ids_BT: Tensor | None,
        mask_BT: Tensor | None,
        places_N: Tensor | None,
        regularisers: Regularisers | None,
        embedded_BTC: Tensor | None,
        layers: dict[str, bool],
    ) -> dict[str, Any]:
        """The code, and what else was asked for, by its name in our output."""
        config = self.config
        if embedded_BTC is not None and ids_BT is None:
            shape = embedded_BTC.shape[:2]
            if not config.mask_padding and shape[1] < config.sequence_length:
                raise ValueError(
                    f"inputs_embeds has {shape[1]} tokens; this model encodes pads too: give all "
                    f"{config.sequence_length}"
                )
            if mask_BT is None or not config.mask_padding:
                mask_BT = torch.ones(shape, dtype=torch.int64, device=embedded_BTC.device)
        elif ids_BT is not None and embedded_BTC is None:
            if not config.mask_padding:
                # A negative pad would cut the sequence that the bottleneck must refuse.
                short = max(0, config.sequence_length - ids_BT.shape[1])
                ids_BT = nn.functional.pad(ids_BT, (0, short), value=self.pad)
                mask_BT = torch.ones_like(ids_BT)
            elif mask_BT is None:
                mask_BT = (ids_BT != self.pad).long()
            if regularisers is not None:
                ids_BT = self._drop_tokens(
                    ids_BT, regularisers, regularisers.input_mask, ENCODER_MASK
                )
        else:
            raise ValueError("encoding needs either input_ids or inputs_embeds")
        if not config.mask_padding:
            places_N = torch.arange(mask_BT.numel(), device=mask_BT.device)
        found: dict[str, Any] = {}
        if ids_BT is not None and not layers and self._packs(ids_BT):
            known = places_N is not None
            layout = Layout.at(places_N, ids_BT.shape) if known else Layout.of(mask_BT.bool())
            states_BTC = layout.unpack(encode(self.t5.encoder, layout.pack(ids_BT), layout))
        else:
            encoded = self.t5.encoder(
                input_ids=ids_BT,
                inputs_embeds=embedded_BTC,
                attention_mask=self._encoder_mask(mask_BT, places_N),
                **layers,
            )
            states_BTC = encoded.last_hidden_state
            if layers:
                found = {
                    "encoder_last_hidden_state": states_BTC,
                    "encoder_hidden_states": encoded.get("hidden_states"),
                    "encoder_attentions": encoded.get("attentions"),
                }
        keys_B = regularisers.keys_B if regularisers else None
        found["latent"], posterior = self.compress(states_BTC, mask_BT, keys_B)
        if posterior is not None:
            found["mean"], found["log_variance"] = posterior
        return found

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

    def _drop_tokens(self, ids_BT: Tensor, noise: Regularisers, rate: float, stream: int) -> Tensor:
        special = {self.pad, self.start, self.end}
        return noise.drop(ids_BT, rate, stream, special, self.config.unknown_token_id)

    def _score(self, states_RC: Tensor, labels_BT: Tensor, places_N: Tensor) -> T5VAEOutput:
        """Cross-entropy of the labels at places, from the states before each of them."""
        states_RC, labels_N = self._scaled(states_RC), labels_BT.flatten()[places_N]
        if self.fused_cross_entropy and torch.is_grad_enabled():
            nll = self.t5.lm_head(states_RC[: len(labels_N)], labels_N, fused=True)
            return T5VAEOutput(loss=nll / max(1, len(labels_N)))
        labels_R = nn.functional.pad(labels_N, (0, len(states_RC) - len(labels_N)), value=-100)
        nll_R = self.t5.lm_head(states_RC, labels_R)
        return losses(nll_R[: len(labels_N)], places_N, labels_BT.shape)

    def generate(self, inputs: Tensor | None = None, *, latent: Tensor | None = None, **kwargs):
        """transformers' `generate` from a code [B, D], or from sequences [B, T] to reconstruct.

        Returns:
            int64 [B, <= sequence_length + 1]: the decoder's start token, then the sequence.
        """
        mask_BT, embedded_BTC = (
            kwargs.pop(name, None) for name in ("attention_mask", "inputs_embeds")
        )
        if latent is None and "encoder_outputs" not in kwargs:
            ids_BT = kwargs.pop("input_ids", inputs)
            latent = self(ids_BT, mask_BT, inputs_embeds=embedded_BTC, mode="encode")
        if latent is not None:
            memory_BMC = self(latent=latent.to(self.dtype), mode="expand")
            kwargs["encoder_outputs"] = BaseModelOutput(last_hidden_state=memory_BMC)
        return super().generate(**kwargs)


AutoModel.register(T5VAEConfig, T5VAE)
