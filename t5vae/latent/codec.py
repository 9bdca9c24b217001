"""Codec: text to latent codes and back with a trained model, in batches.

Shapes: N texts, B texts of one batch, T tokens, D latent size.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from t5vae.common.errors import UserError
from t5vae.latent.decoding import decode, generate
from t5vae.latent.threads import Threads
from t5vae.model import T5VAE

Ids = Sequence[Sequence[int]]

COLDEST = 1e-6  # temperature; below it, logits overflow


class Codec:
    """Encodes and decodes.

    Codes are float32 tensors [N, D] on the CPU; work is done in batches on the model's device, on
    a CPU with as many threads as turn out to be fast (`t5vae.latent.threads`).
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
        self.threads = Threads()

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
            seed: of the draws; the same one gives the same texts, whatever the batch size.

        Returns:
            N strings; for n > 1, N lists of n strings.

        Raises:
            UserError: for codes that are not finite, or a temperature that is neither 0 nor a
                finite number from 1e-6 up.
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
        rows = self.token_ids(texts)
        limit = self.model.config.sequence_length
        for text, row in zip(texts, rows, strict=True):
            if not self.fits(row):
                short = text if len(text) <= 40 else text[:37] + "..."
                raise UserError(
                    f"the text {short!r} has {len(row)} tokens with its end token, the model takes "
                    f"{limit} at most; shorten it, or train on shards with a longer max_length"
                )
        return rows

    def fits(self, row: Sequence[int]) -> bool:
        """Whether a sequence has no more tokens than the model takes."""
        return len(row) <= self.model.config.sequence_length

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts of any length, each ending in the end token."""
        if isinstance(texts, str):
            raise TypeError("texts is one string; give a list of strings")
        if not len(texts):
            return []
        # Text is data: a "</s>" spelled in it is no end token.
        return self.tokenizer(list(texts), split_special_tokens=True, verbose=False)["input_ids"]

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
            with self.threads("encode", ids_BT.numel(), self._device):
                z_ND[rows_B] = self.model(input_ids=ids_BT, mode="encode").float().cpu()
        return z_ND

    @torch.no_grad()
    def decode_ids(
        self, z_ND: Tensor, n: int = 1, temperature: float = 0.0, seed: int = 0
    ) -> list[list[int]]:
        """Token sequences of codes, N * n of them, the n of one code in a row; see `decode`.

        A sequence that reaches the model's length before its end token is cut there.
        """
        if not (temperature == 0 or COLDEST <= temperature < math.inf):
            raise UserError(f"the temperature is {temperature}; give 0, or {COLDEST:g} and more")
        self.check_codes(z_ND)
        beams = 1 if temperature > 0 else n
        z_ND = z_ND.repeat_interleave(n // beams, dim=0)
        chances_NT = None
        if temperature > 0:
            generator = torch.Generator().manual_seed(seed)
            shape = len(z_ND), self.model.config.sequence_length
            chances_NT = torch.rand(shape, generator=generator)
        sequences: list[list[int]] = []
        for begin in range(0, len(z_ND), self.batch_size):
            rows = slice(begin, begin + self.batch_size)
            z_BD = z_ND[rows].to(self._device, self.model.dtype)
            if beams > 1 or self.synced_gpus:
                with self.threads("generate", len(z_BD) * beams, self._device):
                    ids_BT = generate(self.model, z_BD, beams, temperature, self.synced_gpus, seed)
            else:
                chances_BT = None if chances_NT is None else chances_NT[rows].to(self._device)
                ids_BT = decode(self.model, z_BD, temperature, chances_BT, self.threads)
            sequences += [self._until_end(row) for row in ids_BT.tolist()]
        return sequences

    def check_codes(self, z_ND: Tensor) -> None:
        """Refuse codes that are not finite.

        Raises:
            UserError: for any of them.
        """
        if not z_ND.isfinite().all():
            raise UserError("codes are finite numbers; some of these are not")

    @torch.no_grad()
    def score_ids(self, ids: Ids, z_ND: Tensor) -> Tensor:
        """Teacher-forced cross-entropy of each sequence under its code.

        Returns:
            float32 [N], nats per sequence, end token included, on the CPU.
        """
        nll_N = torch.zeros(len(ids))
        for rows_B, ids_BT in self._by_length(ids):
            z_BD = z_ND[rows_B].to(self._device, self.model.dtype)
            with self.threads("score", ids_BT.numel(), self._device):
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
