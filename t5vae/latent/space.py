"""LatentSpace: what one does with a trained model.

Shapes: N texts, D latent size, S steps of a path, K neighbours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import PreTrainedTokenizerBase

from t5vae.common.errors import UserError
from t5vae.latent import directions, distances, properties
from t5vae.latent.checkers import Checker, checker
from t5vae.latent.codec import Codec
from t5vae.latent.corpus import Corpus, FileTexts, GivenTexts, Texts, encode_corpus
from t5vae.latent.folders import load_model
from t5vae.latent.measures import NAMES, measure
from t5vae.latent.optimize import Optimized, optimize
from t5vae.latent.paths import grid, path
from t5vae.latent.priors import Prior, find_prior, fit_prior
from t5vae.latent.properties import Property
from t5vae.latent.workspace import Workspace
from t5vae.model import T5VAE


@dataclass(frozen=True)
class Samples:
    """Strings decoded from a prior.

    Attributes:
        texts: the strings that were kept.
        drawn: how many were decoded to find them; their quotient is the validity.
    """

    texts: list[str]
    drawn: int


@dataclass(frozen=True)
class Neighbor:
    """A text of a corpus, and how far its code is from that of a query.

    Attributes:
        text: as it stands in the corpus.
        distance: |a - b| / sqrt(D).
    """

    text: str
    distance: float


class LatentSpace(Codec):
    """A trained model's space, and what one does with it.

    Codes are float32 tensors [N, D] on the CPU; work is done in batches on the model's device.
    Distances and radii are |a - b| / sqrt(D), in units of the prior's standard deviation: two
    draws of N(0, I) lie about 1.41 apart, whatever D is.

    Attributes:
        workspace: where what is fitted is kept; None for a model that was not loaded from a folder.
    """

    def __init__(
        self,
        model: T5VAE,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 256,
        workspace: Workspace | None = None,
    ):
        super().__init__(model, tokenizer, batch_size)
        self.workspace = workspace

    @classmethod
    def load(
        cls, run_or_export: str | Path, device: str | torch.device | None = None
    ) -> "LatentSpace":
        """Open the export of a run.

        Args:
            run_or_export: a run folder with an `export/`, or the exported folder itself.
            device: where to compute; by default the accelerator if there is one, else the CPU.

        Raises:
            UserError: if there is no such folder, no whole export of a T5VAE in it, or no such
                device.
        """
        workspace = Workspace(Path(run_or_export))
        return cls(*load_model(workspace.export, device), workspace=workspace)

    def interpolate(self, a: str, b: str, steps: int = 11, method: str = "linear") -> list[str]:
        """The texts on the way from a to b.

        Args:
            steps: how many, both ends included: the reconstructions of a and b.
            method: "linear" or "slerp", see :func:`t5vae.latent.paths.path`.

        Raises:
            UserError: for an unknown method, fewer than two steps, or a text that is too long.
        """
        z_2D = self.encode([a, b])
        z_SD = path(z_2D[:1], z_2D[1:], steps, method)[0]
        return self.detokenize(self.decode_ids(z_SD))

    def grid(
        self, a: str, b: str, c: str, d: str, steps: int = 5, method: str = "linear"
    ) -> list[list[str]]:
        """The texts of a square between four: a and b are its upper corners, c and d its lower.

        Args:
            steps: rows and columns; the corners are the reconstructions.
            method: as in `interpolate`.

        Returns:
            Rows of texts, from a, b down to c, d.

        Raises:
            UserError: as in `interpolate`.
        """
        z_SSD = grid(self.encode([a, b, c, d]), steps, method)
        texts = self.detokenize(self.decode_ids(z_SSD.flatten(0, 1)))
        return [texts[i : i + steps] for i in range(0, len(texts), steps)]

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
            prior: one of `t5vae.common.kinds.PRIORS`: "normal" for N(0, I); or fitted on codes,
                such as "gaussian" with their mean and covariance.
            check: keep only what this checker finds valid, see :func:`t5vae.latent.checker`.
            seed: of the draws; the same seed gives the same texts.
            fit: what a prior is fitted on: texts, or codes [N, D]; by default the run's training
                sequences, and that fit is kept with the run.
            temperature: of the decoder, as in `decode`.

        Raises:
            UserError: for an unknown prior or checker, nothing to fit on, or a check that
                100 * n draws (2,000 at least) do not satisfy n times.
        """
        source = self.prior(prior, fit)
        is_valid = checker(check) if check is not None else lambda text: True
        generator = Generator().manual_seed(seed)
        limit = max(100 * n, 2000) if check is not None else n
        texts: list[str] = []
        drawn = 0
        while len(texts) < n and drawn < limit:
            missing = n - len(texts)
            count = missing if check is None else min(max(2 * missing, 64), limit - drawn)
            z_ND = source.draw(count, generator)
            ids = self.decode_ids(z_ND, temperature=temperature, seed=(seed + drawn) % 2**64)
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

    def prior(self, name: str, fit: Sequence[str] | Tensor | None = None) -> Prior:
        """A prior by name, fitted as `sample` says: `draw(n, generator)`, `log_density(z_ND)`.

        Raises:
            UserError: for an unknown prior, or nothing to fit on.
        """
        if not find_prior(name).fewest:
            return fit_prior(name, torch.empty(0, self.latent_size))
        if fit is None:
            return self._workspace.prior(self, name)
        return fit_prior(name, fit if isinstance(fit, Tensor) else self.encode(fit))

    def neighbors(self, text: str, radius: float = 1.5, n: int = 10, seed: int = 0) -> list[str]:
        """What lies around a text: codes at a distance from its own in random directions, decoded.

        Args:
            radius: the distance, in standard deviations of the prior.
            n: how many.
            seed: of the directions.

        Returns:
            n strings, some of them the same.

        Raises:
            UserError: for a radius that is not finite, or a text that is too long.
        """
        noise_ND = torch.randn(n, self.latent_size, generator=Generator().manual_seed(seed))
        steps_ND = torch.nn.functional.normalize(noise_ND) * radius * self.latent_size**0.5
        return self.detokenize(self.decode_ids(self.encode([text]) + steps_ND))

    def encode_corpus(
        self, texts: Sequence[str] | str | Path, out: str | Path, column: str | None = None
    ) -> Corpus:
        """Encode many texts into a folder, streaming, with a progress bar.

        A halted encoding goes on when the same call is made again; one that is done is opened.

        Args:
            texts: strings, or the path of a file, folder, glob or URL: text with one a line, or
                .jsonl, .csv, .parquet; or a pipe of lines.
            out: the folder: `codes.npy`, `rows.npy`, `texts.jsonl`, and what they were made from.
            column: the field that holds the text, for formats that have fields.

        Returns:
            The corpus. Empty cells and lines of files, and texts with too many tokens, are left
            out: `rows_N` says which rows of the source the codes are of, from 0, and `reasons` how
            many there are not.

        Raises:
            UserError: no texts, none that fits, or no encoded corpus in `out` but something else.
        """
        source: Texts
        if isinstance(texts, str | Path):
            source = FileTexts(str(texts), column)
        else:
            source = GivenTexts(texts)
        return encode_corpus(self, source, Path(out), self._workspace.model_sha256)

    def open_corpus(self, folder: str | Path) -> Corpus:
        """A folder that `encode_corpus` made.

        Raises:
            UserError: it is none, is damaged, or another model encoded it.
        """
        return Corpus.open(Path(folder), self._workspace.model_sha256)

    def nearest(
        self, texts: Sequence[str], n: int = 10, corpus: Corpus | None = None
    ) -> list[list[Neighbor]]:
        """The texts of a corpus whose codes are nearest to those of texts, by exhaustive search.

        Args:
            texts: N strings.
            n: how many for each.
            corpus: where to look; by default the run's training sequences, a million at most,
                which are encoded once and kept with the run.

        Returns:
            For each text its neighbours, the nearest first.

        Raises:
            UserError: no corpus, and no run whose training sequences there are.
        """
        corpus = self.training() if corpus is None else corpus
        distances_NK, rows_NK = distances.nearest(self.encode(texts), corpus.codes_ND, n)
        return [
            [Neighbor(*pair) for pair in zip(corpus.texts(rows_K), found_K.tolist(), strict=True)]
            for rows_K, found_K in zip(rows_NK.numpy(), distances_NK, strict=True)
        ]

    def training(self) -> Corpus:
        """The run's training sequences with their codes; see `nearest`.

        Raises:
            UserError: they are not encoded yet, and there is no run with its shards.
        """
        return self._workspace.training(self)

    def direction(self, pairs: Sequence[tuple[str, str]]) -> directions.Direction:
        """What changes between the texts of pairs: `.apply(texts, strength)` changes others so.

        Raises:
            UserError: for no pairs, or a text that is too long.
        """
        return directions.direction(self, pairs)

    def fit_property(
        self,
        texts: Sequence[str] | None,
        values: Sequence[float] | Callable[[str], float] | str,
        kind: str = "ridge",
        name: str = "",
    ) -> Property:
        """Fit a property of texts on their codes, which stay as they are.

        Args:
            texts: N strings; None for the run's training sequences, 50,000 at most. Those with too
                many tokens are left out.
            values: their values; or a function of a text, or its name, see
                :func:`t5vae.latent.measures.measure`. Texts whose value is nan are left out.
            kind: "ridge" (linear) or "mlp" (one with hidden layers).
            name: to keep it under with `keep_property`.

        Raises:
            UserError: too few texts, values that are all alike, an unknown kind or function.
        """
        if texts is None:
            corpus = self.training()
            numbers = Workspace.fitting_rows(corpus)
            texts, codes_ND = corpus.texts(numbers), corpus.codes_ND[numbers]
        else:
            ids = self.token_ids(texts)
            rows = [row for row, tokens in enumerate(ids) if self.fits(tokens)]
            codes_ND = self.encode_ids([ids[row] for row in rows])
            if not (isinstance(values, str) or callable(values)):
                if len(values) != len(texts):
                    raise UserError(f"{len(values)} values for {len(texts)} texts; give one each")
                values = [values[row] for row in rows]
            texts = [texts[row] for row in rows]
        if isinstance(values, str) or callable(values):
            function = measure(values)
            values = [function(text) for text in texts]
        return properties.fit_property(codes_ND, values, kind=kind, name=name)

    def get_property(self, name: str) -> Property:
        """A property that is kept with the run.

        One with the name of a measure is fitted on training sequences, by ridge regression, and
        kept, if it is not yet.

        Raises:
            UserError: none of that name.
        """
        kept = self._workspace.property(self, name)
        if kept is not None:
            return kept
        if name not in NAMES:
            raise UserError(
                f"no property {name!r} is kept with this model: fit one with "
                f"`t5vae fit-property`, or name one of {', '.join(NAMES)}"
            )
        fitted = self.fit_property(None, name, name=name)
        self.keep_property(fitted)
        return fitted

    def keep_property(self, fitted: Property) -> Path:
        """Keep a property with the run, under its name; returns its file."""
        return self._workspace.keep(fitted)

    def optimize(self, text: str, property: Property, **how: Any) -> Optimized:
        """Texts near one with more, or less, of a property; see `t5vae.latent.optimize`."""
        return optimize(self, text, property, **how)

    def outlier_scores(self, texts: Sequence[str]) -> Tensor:
        """How badly the space knows texts: the cross-entropy of each under its own code.

        It tells what is unlike the training data better than the density of its code does, and
        about as well as the distance to the nearest training codes (docs/benchmarks/uses.md).

        Returns:
            float32 [N], nats a token, higher for outliers.

        Raises:
            UserError: for a text that is too long.
        """
        ids = self.tokenize(texts)
        lengths_N = torch.tensor([len(row) for row in ids])
        return self.score_ids(ids, self.encode_ids(ids)) / lengths_N

    def deduplicate(self, texts: Sequence[str] | Corpus, radius: float = 0.1) -> list[int]:
        """Which texts say nothing new: their code lies within a radius of an earlier one's.

        Returns:
            For each text its own number, or the number of the earlier text that it repeats.

        Raises:
            UserError: for a text that is too long.
        """
        codes_ND = texts.codes_ND if isinstance(texts, Corpus) else self.encode(texts)
        return distances.originals(codes_ND, radius).tolist()

    @property
    def _workspace(self) -> Workspace:
        if self.workspace is None:
            raise UserError("nothing is kept with a model in memory: load one from a folder")
        return self.workspace
