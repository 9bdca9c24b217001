"""Codec: text to latent codes and back with a trained model, in batches.

Shapes: N texts, B texts of one batch, T tokens, D latent size.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from shards.errors import UserError
from t5vae.model import T5VAE

Ids = Sequence[Sequence[int]]


class Codec:
    """Encodes and decodes.

    Codes are float32 tensors [N, D] on the CPU; work is done in batches on the model's device.
    An empty string is a sequence like any other: its end token alone.

    Attributes:
        model: the T5VAE, in evaluation mode.
        tokenizer: its tokenizer.
        latent_size: D.
        batch_size: texts per call of the model.
        synced_gpus: keep generating until every rank has ended, which sharded weights need.
    """

    synced_gpus = False

    def __init__(self, model: T5VAE, tokenizer: PreTrainedTokenizerBase, batch_size: int = 256):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.latent_size: int = model.config.latent_size
        self.batch_size = batch_size

    def encode(self, texts: Sequence[str]) -> Tensor:
        """The codes of texts.

        Returns:
            float32 [N, D], on the CPU.

        Raises:
            UserError: for a text with more tokens than the model's `sequence_length`.
        """
        return self.encode_ids(self.tokenize(texts))

    def decode(
        self, z_ND: Tensor, n: int = 1, temperature: float = 0.0, seed: int = 0
    ) -> list[str] | list[list[str]]:
        """The texts of codes.

        Args:
            z_ND: float [N, D].
            n: candidates per code.
            temperature: 0 takes the likeliest token at each step, and the n best of a beam search
                where n > 1; above 0 draws every token, from the softmax of logits / temperature.
            seed: of the draws.

        Returns:
            N strings; for n > 1, N lists of n strings.
        """
        texts = self.detokenize(self.decode_ids(z_ND, n, temperature, seed))
        return texts if n == 1 else [texts[i : i + n] for i in range(0, len(texts), n)]

    def reconstruct(self, texts: Sequence[str]) -> list[str]:
        """Each text encoded and decoded again, greedily."""
        return self.detokenize(self.decode_ids(self.encode(texts)))

    # The same on token ids: sequences as the shards hold them, each ending in the end token.

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, each ending in the end token.

        Raises:
            UserError: for a text with more tokens than the model's `sequence_length`.
        """
        if isinstance(texts, str):
            raise TypeError("texts is one string; give a list of strings")
        if not len(texts):
            return []
        limit = self.model.config.sequence_length
        # Text is data: a "</s>" spelled in it is no end token.
        rows = self.tokenizer(list(texts), split_special_tokens=True, verbose=False)["input_ids"]
        for text, row in zip(texts, rows, strict=True):
            if len(row) > limit:
                short = text if len(text) <= 40 else text[:37] + "..."
                raise UserError(
                    f"the text {short!r} has {len(row)} tokens with its end token, the model takes "
                    f"{limit} at most; shorten it, or train on shards with a longer max_length"
                )
        return rows

    def detokenize(self, ids: Ids) -> list[str]:
        """Texts of token ids, special tokens left out and spaces untouched."""
        if not len(ids):
            return []
        return self.tokenizer.batch_decode(
            [list(row) for row in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    @torch.no_grad()
    def encode_ids(self, ids: Ids) -> Tensor:
        """The codes of token sequences, float32 [N, D], on the CPU."""
        z_ND = torch.zeros(len(ids), self.latent_size)
        for rows_B, ids_BT in self._by_length(ids):
            z_ND[rows_B] = self.model(input_ids=ids_BT, mode="encode").float().cpu()
        return z_ND

    @torch.no_grad()
    def decode_ids(
        self, z_ND: Tensor, n: int = 1, temperature: float = 0.0, seed: int = 0
    ) -> list[list[int]]:
        """Token sequences of codes, N * n of them, the n of one code in a row; see `decode`.

        A sequence that reaches the model's length before its end token is cut there.
        """
        how: dict = {"do_sample": False, "num_beams": n, "num_return_sequences": n}
        if temperature > 0:
            how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            z_ND = z_ND.repeat_interleave(n, dim=0)
        sequences: list[list[int]] = []
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for z_BD in z_ND.split(self.batch_size) if len(z_ND) else ():
                ids_BT = self.model.generate(
                    latent=z_BD.to(self._device), synced_gpus=self.synced_gpus, **how
                )
                sequences += [self._until_end(row) for row in ids_BT[:, 1:].tolist()]
        return sequences

    @torch.no_grad()
    def score_ids(self, ids: Ids, z_ND: Tensor) -> Tensor:
        """Teacher-forced cross-entropy of each sequence under its code.

        Returns:
            float32 [N], nats per sequence, end token included, on the CPU.
        """
        nll_N = torch.zeros(len(ids))
        for rows_B, ids_BT in self._by_length(ids):
            z_BD = z_ND[rows_B].to(self._device, self.model.dtype)
            nll_N[rows_B] = self.model(input_ids=ids_BT, latent=z_BD, mode="score").nll.cpu()
        return nll_N

    def _by_length(self, ids: Ids) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of similar length: row numbers [B] and padded ids [B, T] on the device."""
        order_N = torch.tensor([len(row) for row in ids], dtype=torch.long).argsort(stable=True)
        for rows_B in order_N.split(self.batch_size) if len(ids) else ():
            batch = [torch.from_numpy(np.asarray(ids[i], dtype=np.int64)) for i in rows_B.tolist()]
            ids_BT = pad_sequence(batch, batch_first=True, padding_value=self.model.pad)
            yield rows_B, ids_BT.to(self._device)

    def _until_end(self, row: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return row[: row.index(end) + 1] if end in row else row

    @property
    def _device(self) -> torch.device:
        return self.model.device
