"""Workspace: what is found out about a space once and kept with its run."""

import hashlib
import re
from functools import cached_property
from pathlib import Path

import numpy as np

from shards import Dataset
from t5vae.common.errors import UserError
from t5vae.common.links import refuse_links
from t5vae.config import read_run
from t5vae.latent.codec import Codec
from t5vae.latent.corpus import Corpus, SplitTexts, encode_corpus, read_manifest
from t5vae.latent.folders import export_folder
from t5vae.latent.priors import Prior, fit_prior, load_prior, save_prior
from t5vae.latent.properties import Property, load_property, save_property
from t5vae.model.files import weight_files

FOLDER = "latent"
TRAINING = 1_000_000  # training sequences that are encoded
FIT = 50_000  # of them, those that priors and properties are fitted on


class Workspace:
    """The folder `latent` of a run, or of an export that lies alone.

    `train/` is the encoded training split, `priors/` and `properties/` hold what was fitted. What
    another model's codes made is made anew.

    Args:
        run_or_export: a run folder, or an export.
    """

    def __init__(self, run_or_export: Path):
        self.export = export_folder(run_or_export)
        above = self.export.resolve().parent
        in_run = self.export.name == "export" and (above / "config.yaml").is_file()
        self.home = above if in_run else self.export
        self.folder = self.home / FOLDER

    @cached_property
    def model_sha256(self) -> str:
        """Of the model's weights."""
        digest = hashlib.sha256()
        for path in weight_files(self.export):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def dataset(self) -> Dataset:
        """The run's shards.

        Raises:
            UserError: an export that lies alone, or no shards where the run had them.
        """
        config = self.home / "config.yaml"
        if not config.is_file():
            raise UserError(
                f"{self.home} has no run beside it, so its training sequences are unknown: give "
                "a run folder, or your own texts"
            )
        return read_run(self.home).data.open()

    def training(self, codec: Codec) -> Corpus:
        """Training sequences with their codes, a million at most, encoded if they are not yet.

        Raises:
            UserError: they are not, and there are no shards to encode them from.
        """
        folder = self.folder / "train"
        manifest = read_manifest(folder)
        if manifest is not None and manifest["model_sha256"] == self.model_sha256:
            return Corpus.open(folder, self.model_sha256)
        refuse_links(self.home, FOLDER)
        source = SplitTexts(self.dataset(), "train", TRAINING)
        return encode_corpus(codec, source, folder, self.model_sha256)

    @staticmethod
    def fitting_rows(corpus: Corpus) -> np.ndarray:
        """Rows of the training sequences that are fitted on, the same ones each time."""
        return np.sort(np.random.default_rng(0).permutation(len(corpus))[:FIT])

    def prior(self, codec: Codec, name: str) -> Prior:
        """A prior fitted on training sequences, fitted if it is not yet."""
        path = self.folder / "priors" / f"{name}.safetensors"
        made_from = {"model_sha256": self.model_sha256}
        prior = load_prior(path, made_from, codec.latent_size)
        if prior is None:
            corpus = self.training(codec)
            prior = fit_prior(name, corpus.codes_ND[self.fitting_rows(corpus)])
            refuse_links(self.home, FOLDER)
            save_prior(name, prior, path, made_from)
        return prior

    def property(self, codec: Codec, name: str) -> Property | None:
        """The kept property of that name; None where there is none, or of another model.

        Raises:
            UserError: the name cannot be a file's, or the file is damaged.
        """
        made_from = {"model_sha256": self.model_sha256}
        return load_property(self._property_path(name), made_from, codec.latent_size)

    def keep(self, fitted: Property) -> Path:
        """Keep a property under its name; returns its file.

        Raises:
            UserError: the name cannot be a file's.
        """
        path = self._property_path(fitted.name)
        refuse_links(self.home, FOLDER)
        save_property(fitted, path, {"model_sha256": self.model_sha256})
        return path

    def _property_path(self, name: str) -> Path:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(
                f"a property cannot be kept as {name!r}: name it with letters, digits, _, - and ."
            )
        return self.folder / "properties" / f"{name}.safetensors"
