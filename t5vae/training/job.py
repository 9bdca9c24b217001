"""A job: a run's configuration, its ranks and its data, and all that follows from them."""

import json
import shlex
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from shards import Dataset
from t5vae.checkpoint.manifest import FORMAT, check_identity, verify
from t5vae.checkpoint.retention import newest_manifest
from t5vae.cluster.ranks import Ranks
from t5vae.common.errors import UserError
from t5vae.common.links import refuse_links
from t5vae.common.quiet import log_file_of
from t5vae.config import BatchSplit, Config, Eval, Train, read_run
from t5vae.latent import checker
from t5vae.model import T5VAE, T5VAEConfig, parameter_counts
from t5vae.training.build import check_base, is_installed, model_config
from t5vae.training.deepspeed_settings import deepspeed_config


@dataclass(frozen=True)
class Job:
    """A run, resolved before it starts.

    Attributes:
        config: the run's. What it leaves open is settled once the ranks have met: another job then.
        ranks: which process this is.
        dataset: the shards.
        settings: the model's.
        parameters: of the model.
        split: how the global batch is dealt.
        identity: what a run that goes on must agree with.
        tiles: of the objective's terms, see `settle_tiles`.
    """

    config: Config
    ranks: Ranks
    dataset: Dataset
    settings: T5VAEConfig
    parameters: int
    split: BatchSplit
    identity: dict[str, Any]
    tiles: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return self.config.train.steps

    @property
    def folder(self) -> Path:
        """The run's."""
        return self.config.run_dir

    @property
    def log_file(self) -> Path:
        """This rank's, for what libraries say."""
        return log_file_of(self.folder, self.ranks.rank)

    @cached_property
    def deepspeed(self) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        config = self.config
        return deepspeed_config(config.deepspeed, config.optim, config.train.precision, self.split)

    @property
    def layout(self) -> dict[str, Any]:
        """What may be another when a run goes on; with another MMD batch its losses differ."""
        return {
            "world_size": self.ranks.world_size,
            "mmd_batch": self.split.micro * self.split.ranks,
            "zero_stage": self.config.deepspeed.zero_stage,
            "precision": self.config.train.precision,
            "muon_precision": self.config.optim.muon_precision,
            "tiles": self.tiles,
        }

    @property
    def summary(self) -> str:
        """What is about to be trained, in one line."""
        sequences = self.dataset.sequences("train")
        epochs = round(self.steps * self.split.sequences / sequences, 2)
        return (
            f"{self.parameters:,} parameters, {self.ranks.world_size} ranks, {sequences:,} "
            f"sequences, {epochs} epochs in {self.steps:,} steps"
        )

    def tell_finished(self) -> None:
        """Say that there is nothing left to do."""
        if self.ranks.is_first:
            by = "minutes" if self.config.train.minutes else "steps"
            print(
                f"{self.folder} is already trained: {self.steps:,} steps; raise train.{by} to go on"
            )

    def replay(self, position: int, order_version: int) -> str:
        """The command that shows the global batch at a position of the stream."""
        data = self.config.data
        mixture = [] if isinstance(data.shards, str) else data.shards
        weights = [f"--weight={source.weight}" for source in mixture]
        where = {
            "position": position,
            "batch": data.global_batch_size,
            "seed": self.config.run.seed,
            "order-version": order_version,
        }
        options = [f"--{name}={value}" for name, value in where.items()]
        return shlex.join(["t5vae", "shards", "inspect", *data.paths, *weights, *options])

    def logs_after(self, step: int) -> bool:
        return step % self.config.log.every == 0 or step == self.steps

    def saves_after(self, step: int) -> bool:
        every = self.config.checkpoint.every
        return (every > 0 and step % every == 0) or step == self.steps

    def evaluates_after(self, step: int) -> bool:
        every = self.config.eval.every
        return every > 0 and (step % every == 0 or self.saves_after(step))

    def is_finished(self) -> bool:
        """Whether the run's steps are all done, as far as sizes of files tell.

        Raises:
            UserError: if the run that is there is another one.
        """
        manifest = manifest_before(self.config)
        if manifest is None:
            return False
        check_identity(manifest, self.identity)
        if manifest["step"] < self.steps:
            return False
        newest = self.folder / f"checkpoints/step-{manifest['step']:08d}"
        return verify(newest, hashes=False) is None


def resolve(config: Config, ranks: Ranks) -> Job:
    """Resolve a run, and refuse what can be refused without a process group.

    Raises:
        UserError: for missing or damaged shards, a batch that does not divide, a model that does
            not fit the shards, a disk too full for a checkpoint, or a link out of the run's folder.
        StorageError: shards or the run's folder could not be read for minutes.
    """
    if ranks.is_first:
        refuse_links(config.run_dir)
    dataset = config.data.open()
    settings = model_config(config.model, config.objective, dataset)
    with torch.device("meta"):
        parameters = parameter_counts(T5VAE(settings))["total"]
    split = config.data.split(ranks.world_size)
    check_base(config.model.base, dataset)
    for name, term in config.objective.computed.items():
        if split.micro * split.ranks < term.fewest:
            raise UserError(
                f"objective.{name} needs at least {term.fewest} sequences in a micro step over all "
                "ranks"
            )
    _check_kernels(config)
    _check_evaluation(config.eval, dataset)
    if config.log.tensorboard and not is_installed("tensorboard"):
        raise UserError(
            "log.tensorboard needs the package tensorboard: pip install 't5vae[tensorboard]', or "
            "leave it out"
        )
    _check_disk(config.run_dir, 16 * parameters)
    return Job(
        with_steps_before(config),
        ranks,
        dataset,
        settings,
        parameters,
        split,
        identity(config, settings, dataset),
    )


def _check_kernels(config: Config) -> None:
    """What is written for CUDA alone."""
    needed = {
        f"objective.{name}.{key}": package
        for name, term in config.objective.computed.items()
        for key, package in term.packages.items()
    }
    if config.model.fused_cross_entropy:
        needed["model.fused_cross_entropy"] = "liger-kernel"
    for key, package in needed.items():
        if not (torch.cuda.is_available() and is_installed(package)):
            raise UserError(f"{key} needs a CUDA device and the package {package}; leave it out")


def _check_evaluation(settings: Eval, dataset: Dataset) -> None:
    """What evaluation during training needs."""
    if not settings.every:
        return
    if settings.check is not None:
        checker(settings.check)
    held_out = dataset.sequences("valid")
    if held_out < 2:
        raise UserError(
            f"eval.every evaluates on held-out sequences, of which {dataset.path} has "
            f"{held_out}: build shards with a larger valid_fraction, or leave it out"
        )


def _check_disk(folder: Path, checkpoint: int) -> None:
    """Room for two checkpoints of so many bytes."""
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    free = shutil.disk_usage(nearest).free
    if free < checkpoint * 2:
        raise UserError(
            f"{nearest} has {free / 2**20:,.0f} MiB free; two checkpoints of this model need "
            f"{checkpoint * 2 / 2**20:,.0f} MiB: free some space, or set run.output_dir elsewhere"
        )


def manifest_before(config: Config) -> dict[str, Any] | None:
    """The newest manifest of the run that this one goes on with; None where it starts anew."""
    manifest = newest_manifest(config.run_dir / "checkpoints")
    anew = config.checkpoint.resume == "weights" and not (manifest or {}).get("weights_from")
    return None if anew else manifest


def with_steps_before(config: Config) -> Config:
    """The configuration with the steps of the run that it goes on with, where it has minutes.

    Other minutes than those of that run are as many more steps, or fewer. A run that began with a
    fixed number of steps keeps that, and has no minutes.
    """
    minutes = config.train.minutes
    if minutes is None or (before := train_before(config)) is None:
        return config
    if before.minutes is None:
        return config.with_("train", steps=before.steps, minutes=None)
    return config.with_("train", steps=max(1, round(before.steps * minutes / before.minutes)))


def train_before(config: Config) -> Train | None:
    """What was set for the run that this one goes on with, if it does."""
    if manifest_before(config) is None:
        return None
    try:
        return read_run(config.run_dir).train
    except UserError:
        return None


def identity(config: Config, settings: T5VAEConfig, dataset: Dataset) -> dict[str, Any]:
    """What a run that goes on must agree with."""
    model = json.loads(settings.to_json_string(use_diff=False))
    del model["transformers_version"]  # a new release does not make it another model
    return {
        "format": FORMAT,
        "optimizer": config.optim.name,
        "global_batch_size": config.data.global_batch_size,
        "seed": config.run.seed,
        "shards": dataset.sha256,
        "tokenizer": dataset.tokenizer_fingerprint,
        "model": model,
    }
