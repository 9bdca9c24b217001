"""LatentSpace: a trained model as one uses it, from strings to codes and back.

Shapes: N texts, B texts of one batch, T tokens, D latent size.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from shards.errors import UserError
from shards.tokenizers import load_tokenizer
from t5vae.latent.checkers import Checker, checker
from t5vae.latent.codes import PRIORS, Gaussian, Normal, path
from t5vae.model import T5VAE

Ids = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Samples:
    """Strings decoded from a prior.

    Attributes:
        texts: the strings that were kept.
        drawn: how many were decoded to find them; their quotient is the validity.
    """

    texts: list[str]
    drawn: int


class LatentSpace:
    """Encode, decode, interpolate and sample with a trained model.

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

    @classmethod
    def load(
        cls, run_or_export: str | Path, device: str | torch.device | None = None
    ) -> "LatentSpace":
        """Open the export of a run.

        Args:
            run_or_export: a run folder with an `export/`, or the exported folder itself.
            device: where to compute; by default the accelerator if there is one, else the CPU.

        Raises:
            UserError: if there is no such folder, or no whole export of a T5VAE in it.
        """
        folder = _export_folder(Path(run_or_export))
        try:
            model, found = T5VAE.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
            if found["missing_keys"]:
                raise ValueError(f"{min(found['missing_keys'])} is missing")
        except Exception as error:  # transformers and safetensors raise a dozen kinds
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{folder} is not a whole export ({reason}); write it again with `t5vae export RUN`"
            ) from error
        if device is None:
            device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        model.to(torch.device(device))  # type: ignore[arg-type]
        return cls(model, load_tokenizer(folder))

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

    def interpolate(self, a: str, b: str, steps: int = 11, method: str = "linear") -> list[str]:
        """The texts on the way from a to b.

        Args:
            steps: how many, both ends included: the reconstructions of a and b.
            method: "linear" or "slerp", see :func:`t5vae.latent.codes.path`.

        Raises:
            UserError: for an unknown method, fewer than two steps, or a text that is too long.
        """
        z_2D = self.encode([a, b])
        z_SD = path(z_2D[:1], z_2D[1:], steps, method)[0]
        return self.detokenize(self.decode_ids(z_SD))

    def sample(
        self,
        n: int,
        prior: str = "normal",
        check: str | Checker | None = None,
        seed: int = 0,
        fit: Sequence[str] | Tensor | None = None,
        temperature: float = 0.0,
    ) -> Samples:
        """Decode draws from a prior.

        Args:
            n: how many texts.
            prior: "normal" for N(0, I); "gaussian" for the mean and covariance of `fit`.
            check: keep only what this checker finds valid, see :func:`t5vae.latent.checker`.
            seed: of the draws; the same seed gives the same texts.
            fit: for "gaussian": texts, or their codes [N, D].
            temperature: of the decoder, as in `decode`.

        Raises:
            UserError: for an unknown prior or checker, "gaussian" without `fit`, or a check that
                100 * n draws (2,000 at least) do not satisfy n times.
        """
        source = self._prior(prior, fit)
        is_valid = checker(check) if check is not None else lambda text: True
        generator = torch.Generator().manual_seed(seed)
        limit = max(100 * n, 2000) if check is not None else n
        texts: list[str] = []
        drawn = 0
        while len(texts) < n and drawn < limit:
            missing = n - len(texts)
            count = missing if check is None else min(max(2 * missing, 64), limit - drawn)
            z_ND = source.draw(count, generator)
            ids = self.decode_ids(z_ND, temperature=temperature, seed=seed + drawn)
            for text in self.detokenize(ids):
                drawn += 1
                if is_valid(text):
                    texts.append(text)
                    if len(texts) == n:
                        break
        if len(texts) < n:
            raise UserError(
                f"only {len(texts)} of {drawn} samples pass the check {check!r}, {n} were asked "
                "for; ask for fewer, leave the check out, or train longer"
            )
        return Samples(texts, drawn)

    def _prior(self, prior: str, fit: Sequence[str] | Tensor | None) -> Normal | Gaussian:
        if prior not in PRIORS:
            raise UserError(f"unknown prior {prior!r}; choose one of {', '.join(PRIORS)}")
        if prior == "normal":
            return Normal(self.latent_size)
        if fit is None:
            raise UserError("the prior 'gaussian' is fitted on texts; give some (fit=)")
        return Gaussian(fit if isinstance(fit, Tensor) else self.encode(fit))

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


def _export_folder(given: Path) -> Path:
    """The folder with the model's files: `given` itself, or its `export/`."""
    if not given.is_dir():
        raise UserError(
            f"no folder {given}; give a run folder, or an export written by `t5vae export RUN`"
        )
    folder = given / "export" if (given / "export").is_dir() else given
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer_config.json")):
        raise UserError(f"{given} holds no exported model; write one with `t5vae export {given}`")
    try:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
    except (ValueError, KeyError, TypeError):
        kind = None
    if kind != T5VAE.config_class.model_type:
        raise UserError(
            f"{folder} holds a model of type {kind!r}, not a T5VAE; give a run folder, or an "
            "export written by `t5vae export RUN`"
        )
    return folder
