"""From a configuration to the parts of a run, every check made before a process group exists."""

import fcntl
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import torch

from shards import Dataset, UserError
from t5vae.config import Config
from t5vae.model import T5VAE, T5VAEConfig
from t5vae.training.checkpoint import check_identity, newest_manifest


def model_config(config: Config, dataset: Dataset | None) -> T5VAEConfig:
    """The model's configuration; vocabulary, special ids and T come from the shards unless set.

    Args:
        dataset: the shards; None where there are none yet and the configuration names both
            `model.vocab_size` and `model.sequence_length`.

    Raises:
        UserError: where an explicit key cannot hold what the shards contain.
    """
    vocabulary, length = config.model.vocab_size, config.model.sequence_length
    pad, eos = (dataset.pad_id, dataset.eos_id) if dataset else (0, 1)
    if dataset:
        vocabulary = vocabulary or dataset.vocab_size
        length = length or dataset.max_length
        if vocabulary < dataset.vocab_size:
            raise UserError(
                f"model.vocab_size {vocabulary} is smaller than the {dataset.vocab_size} pieces of "
                f"the tokenizer in {dataset.path}; leave it out to take the tokenizer's"
            )
        if length < dataset.max_length:
            raise UserError(
                f"model.sequence_length {length} is shorter than the longest sequences in "
                f"{dataset.path} ({dataset.max_length} tokens); leave it out to take the shards'"
            )
    t5 = config.model.t5.model_dump(exclude_none=True)
    t5.update(vocab_size=vocabulary, pad_token_id=pad, eos_token_id=eos)
    elsewhere = {"t5", "vocab_size", "sequence_length", "gradient_checkpointing"}
    return T5VAEConfig(t5=t5, sequence_length=length, **config.model.model_dump(exclude=elsewhere))


def build_model(config: Config, dataset: Dataset) -> T5VAE:
    """A T5VAE with random weights from the run's seed."""
    torch.manual_seed(config.run.seed)
    model = T5VAE(model_config(config, dataset))
    if config.train.precision != "fp32" and not torch.accelerator.is_available():
        # On a CPU torch's fused attention is slower in half precision than the plain one.
        model.t5.set_attn_implementation("eager")
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def describe(config: Config, dataset: Dataset | None, world_size: int) -> dict[str, Any]:
    """What follows from a configuration: batch, epochs, parameters, memory. Nothing is allocated.

    Memory is an estimate for weights, gradients and the optimiser's state; activations are not in
    it. Without a dataset, what depends on the data is left out.
    """
    with torch.device("meta"):
        model = T5VAE(model_config(config, dataset))
    parameters = sum(p.numel() for p in model.parameters())
    batch = config.data.global_batch_size
    accumulation = config.accumulation(world_size)
    facts = {
        "world_size": world_size,
        "accumulation": accumulation,
        "micro_batch_size": batch // (accumulation * world_size),
        "vocab_size": model.config.t5["vocab_size"],
        "sequence_length": model.config.sequence_length,
        "parameters": parameters,
        "state_bytes_per_rank": state_bytes(parameters, config, world_size),
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
    return describe(config, dataset, world_size)


def state_bytes(parameters: int, config: Config, world_size: int) -> int:
    """Bytes a rank needs for weights, gradients and Adam's state.

    Per parameter 4 + 4 + 8 in fp32, 2 + 2 + 12 in half precision; ZeRO stage 1 divides the state
    by the ranks, 2 the gradients too, 3 the weights too (Rajbhandari et al., ZeRO, arXiv
    1910.02054, section 3.1).
    """
    half = config.train.precision != "fp32"
    state, gradients, weights = (12, 2, 2) if half else (8, 4, 4)
    stage = config.deepspeed.zero_stage
    parts = [
        size / (world_size if stage >= divided_from else 1)
        for size, divided_from in ((state, 1), (gradients, 2), (weights, 3))
    ]
    return round(parameters * sum(parts))


def check_before_start(config: Config, world_size: int) -> Dataset:
    """Everything that can be refused without a process group.

    Raises:
        UserError: for missing or damaged shards, a batch that does not divide, a model that does
            not fit the shards, or a disk too full for a checkpoint.
    """
    dataset = config.data.open()
    facts = describe(config, dataset, world_size)
    if facts["micro_batch_size"] * world_size < 2 and config.objective.mmd.estimator == "u":
        raise UserError(
            "the unbiased MMD needs at least 2 sequences in a micro step over all ranks"
        )
    if config.objective.mmd.implementation == "triton" and not (
        torch.cuda.is_available() and find_spec("triton")
    ):
        raise UserError(
            "objective.mmd.implementation=triton needs a CUDA device and the package triton; "
            "leave it out, or name blocked"
        )
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


def make_folder(folder: Path) -> None:
    """Make a folder of the run.

    Raises:
        UserError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None


def prepare_run_dir(config: Config) -> IO[str]:
    """Make the run's folder and lock it; rank 0 alone. The lock dies with this process.

    Raises:
        UserError: if another process trains in it, or `checkpoint.resume` is "never" and it holds
            checkpoints.
    """
    folder = config.run_dir
    make_folder(folder / "checkpoints")
    try:
        lock = open(folder / ".lock", "a+")  # noqa: SIM115 (held until the run ends)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another process is training in {folder}; wait for it, or set run.output_dir"
        ) from None
    except OSError as error:
        raise UserError(f"cannot use the run folder {folder}: {error.strerror}") from None
    if config.checkpoint.resume == "never" and any((folder / "checkpoints").iterdir()):
        lock.close()
        raise UserError(
            f"{folder} holds checkpoints and checkpoint.resume is never; "
            "set it to auto, or choose another run.output_dir"
        )
    return lock


def is_finished(config: Config, identity: dict[str, Any]) -> bool:
    """Whether the run's steps are all done.

    Raises:
        UserError: if the run that is there is another one than `config` describes.
    """
    manifest = newest_manifest(config.run_dir / "checkpoints")
    if manifest is None:
        return False
    check_identity(manifest, identity)
    return manifest["step"] >= config.train.steps


def write_config(config: Config) -> None:
    """Save the resolved configuration in the run's folder, atomically."""
    path = config.run_dir / "config.yaml"
    tmp = Path(f"{path}.{os.getpid()}.tmp")
    tmp.write_text(config.dump())
    tmp.replace(path)


def identity(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What a run that resumes must agree with."""
    model = json.loads(model_config(config, dataset).to_json_string(use_diff=False))
    del model["transformers_version"]  # a new release does not make it another model
    return {
        "zero_stage": config.deepspeed.zero_stage,
        "precision": config.train.precision,
        "optimizer": config.optim.name,
        "global_batch_size": config.data.global_batch_size,
        "seed": config.run.seed,
        "shards": dataset.sha256,
        "tokenizer": dataset.tokenizer_fingerprint,
        "model": model,
    }
