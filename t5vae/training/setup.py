"""What follows from a configuration, what is checked before a process group exists, the folder."""

import json
import shutil
from typing import Any

import torch

from shards import Dataset
from t5vae.checkpoint.manifest import FORMAT, check_identity, verify
from t5vae.checkpoint.retention import newest_manifest
from t5vae.common.errors import UserError
from t5vae.config import Config
from t5vae.latent import checker
from t5vae.model import T5VAE, check_tokenizer, flops_per_token, parameter_counts
from t5vae.planning.memory import sizes_of, state_bytes
from t5vae.training.build import is_installed, model_config


def describe(config: Config, dataset: Dataset | None, world_size: int) -> dict[str, Any]:
    """What follows from a configuration: batch, epochs, parameters, operations, memory.

    Nothing is allocated. Operations are those of training, a token of the longest sequences;
    memory is that of weights, gradients and the optimiser's state, see `t5vae.planning.plan` for
    all of it. Without a dataset, what depends on the data is left out.
    """
    with torch.device("meta"):
        model = T5VAE(model_config(config, dataset))
    parts = parameter_counts(model)
    parameters, sizes = parts.pop("total"), sizes_of(model, config.optim.name)
    batch = config.data.global_batch_size
    accumulation = config.accumulation(world_size)
    facts = {
        "world_size": world_size,
        "accumulation": accumulation,
        "micro_batch_size": batch // (accumulation * world_size),
        "vocab_size": model.config.t5["vocab_size"],
        "sequence_length": model.config.sequence_length,
        "parameters": parameters,
        "parameters_by_part": parts,
        "flops_per_token": round(flops_per_token(model.config, model.config.sequence_length)),
        "state_bytes_per_rank": state_bytes(config, sizes, world_size),
    }
    if dataset:
        sequences = dataset.sequences("train")
        facts |= {
            "train_sequences": sequences,
            "steps_per_epoch": round(sequences / batch, 2),
            "epochs": round(config.train.steps * batch / sequences, 2),
        }
    return facts


def describe_config(config: Config, world_size: int) -> dict[str, Any]:
    """`describe`, with the configuration's shards where they exist.

    Raises:
        UserError: where they do not, and the configuration does not say what they would.
    """
    try:
        dataset = config.data.open()
    except UserError:
        if not (config.model.vocab_size and config.model.sequence_length):
            raise
        dataset = None
    check_base(config, dataset)
    return describe(config, dataset, world_size)


def check_base(config: Config, dataset: Dataset | None) -> None:
    """Refuse a base whose tokenizer is not the shards'.

    Raises:
        UserError: if it is another.
    """
    if config.model.base is not None and dataset is not None:
        check_tokenizer(config.model.base, dataset.tokenizer(), dataset.path)


def check_before_start(config: Config, world_size: int) -> Dataset:
    """Everything that can be refused without a process group.

    Raises:
        UserError: for missing or damaged shards, a batch that does not divide, a model that does
            not fit the shards, or a disk too full for a checkpoint.
    """
    dataset = config.data.open()
    facts = describe(config, dataset, world_size)
    check_base(config, dataset)
    if facts["micro_batch_size"] * world_size < 2 and config.objective.mmd.estimator == "u":
        raise UserError(
            "the unbiased MMD needs at least 2 sequences in a micro step over all ranks"
        )
    kernels = {
        "objective.mmd.implementation": (config.objective.mmd.implementation == "triton", "triton"),
        "model.fused_cross_entropy": (config.model.fused_cross_entropy, "liger-kernel"),
    }
    for key, (wanted, package) in kernels.items():
        if wanted and not (torch.cuda.is_available() and is_installed(package)):
            raise UserError(f"{key} needs a CUDA device and the package {package}; leave it out")
    _check_what_watches(config, dataset)
    nearest = config.run_dir.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    free = shutil.disk_usage(nearest).free
    checkpoint = facts["parameters"] * 16
    if free < checkpoint * 2:
        raise UserError(
            f"{nearest} has {free / 2**20:,.0f} MiB free; two checkpoints of this model need "
            f"{checkpoint * 2 / 2**20:,.0f} MiB: free some space, or set run.output_dir elsewhere"
        )
    return dataset


def _check_what_watches(config: Config, dataset: Dataset) -> None:
    """Evaluation during training, and what its figures go to."""
    if config.eval.every:
        if config.eval.check is not None:
            checker(config.eval.check)
        held_out = dataset.sequences("valid")
        if held_out < 2:
            raise UserError(
                f"eval.every evaluates on held-out sequences, of which {dataset.path} has "
                f"{held_out}: build shards with a larger valid_fraction, or leave it out"
            )
    if config.log.tensorboard and not is_installed("tensorboard"):
        raise UserError(
            "log.tensorboard needs the package tensorboard: pip install 't5vae[tensorboard]', or "
            "leave it out"
        )


def is_finished(config: Config, identity: dict[str, Any]) -> bool:
    """Whether the run's steps are all done.

    Raises:
        UserError: if the run that is there is another one than `config` describes.
    """
    manifest = manifest_before(config)
    if manifest is None:
        return False
    check_identity(manifest, identity)
    if manifest["step"] < config.train.steps:
        return False
    return verify(config.run_dir / f"checkpoints/step-{manifest['step']:08d}") is None


def manifest_before(config: Config) -> dict[str, Any] | None:
    """The newest manifest of the run that this one goes on with; None where it starts anew."""
    manifest = newest_manifest(config.run_dir / "checkpoints")
    anew = config.checkpoint.resume == "weights" and not (manifest or {}).get("weights_from")
    return None if anew else manifest


def layout_before(config: Config) -> dict[str, Any]:
    """The layout of the run that this one goes on with; empty where it starts anew."""
    return (manifest_before(config) or {}).get("layout", {})


def identity(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What a run that resumes must agree with."""
    model = json.loads(model_config(config, dataset).to_json_string(use_diff=False))
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


def layout(config: Config, world_size: int) -> dict[str, Any]:
    """What may be another when a run resumes; with another MMD batch its losses differ."""
    return {
        "world_size": world_size,
        "mmd_batch": config.data.global_batch_size // config.accumulation(world_size),
        "zero_stage": config.deepspeed.zero_stage,
        "precision": config.train.precision,
        "muon_precision": config.optim.muon_precision,
    }
