"""From a configuration and its shards to a model."""

from importlib.util import find_spec
from typing import Any

import torch

from shards import Dataset
from t5vae.common.errors import UserError
from t5vae.config import Model, Objective
from t5vae.model import T5VAE, T5VAEConfig, check_tokenizer, read_base, t5_settings


def model_config(model: Model, objective: Objective, dataset: Dataset | None) -> T5VAEConfig:
    """The model's configuration; vocabulary, special ids and T come from the shards unless set.

    Args:
        model: the configuration's section.
        objective: says whether the model must know an unknown token.
        dataset: the shards; None where there are none yet and the configuration names both
            `model.vocab_size` and `model.sequence_length`.

    Raises:
        UserError: where an explicit key cannot hold what the shards contain, or a size is out of
            reach.
    """
    vocabulary, length = model.vocab_size, model.sequence_length
    pad, eos, unknown = 0, 1, 2
    if dataset:
        vocabulary = vocabulary or dataset.vocab_size
        length = length or dataset.max_length
        pad, eos, unknown = _special_tokens(objective, dataset)
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
    t5, tied = _t5_settings(model)
    own = {"vocab_size": vocabulary, "pad_token_id": pad, "eos_token_id": eos}
    elsewhere = {"base", "t5", "vocab_size", "sequence_length"}
    execution = {"gradient_checkpointing", "compile", "fused_cross_entropy"}
    try:
        return T5VAEConfig(
            t5={**t5, **own, "decoder_start_token_id": pad},
            tie_word_embeddings=tied,
            sequence_length=length,
            unknown_token_id=unknown,
            **model.model_dump(exclude=elsewhere | execution),
        )
    except ValueError as error:
        raise UserError(f"no such model can be made: {error}") from None


def _special_tokens(objective: Objective, dataset: Dataset) -> tuple[int, int, int]:
    """The ids of pad, end and unknown."""
    pad, eos, unknown = dataset.pad_id, dataset.eos_id, dataset.tokenizer().unk_token_id
    if pad == eos:
        raise UserError(
            f"the tokenizer of {dataset.path} has one token ({pad}) for pad and end, so a model "
            "would not learn to end; give it a pad token of its own and build the shards again"
        )
    if unknown in (None, pad, eos):
        for name in ("input_mask", "word_dropout"):
            if getattr(objective, name):
                raise UserError(
                    f"objective.{name} puts the unknown token in place of others, but the "
                    f"tokenizer of {dataset.path} has none; set it to 0"
                )
        unknown = eos
    return pad, eos, unknown


def _t5_settings(model: Model) -> tuple[dict[str, Any], bool]:
    """The T5's settings, and whether its embeddings are tied."""
    given = model.t5.model_dump(exclude_none=True)
    name = model.base
    if name is None:
        return t5_settings({"dropout_rate": 0.0, **given}), True
    base, tied = read_base(name)
    for key, value in given.items():
        if value != base[key] and key != "dropout_rate":
            raise UserError(
                f"model.t5.{key} is {value!r}, but that of model.base {name!r} is {base[key]!r}; "
                "leave it out"
            )
    return {**base, **given}, tied


def build_model(
    settings: T5VAEConfig, options: Model, *, seed: int, half: bool, device: torch.device
) -> T5VAE:
    """A T5VAE with random weights from a seed, its T5's from the base if there is one.

    On CUDA an fp32 model's matrices are multiplied in TF32 from now on, as this process's others
    are: see `t5vae.objective.precision`.

    Args:
        settings: the model's.
        options: the configuration's section, which says how the model computes.
        seed: of the weights.
        half: whether it will compute in 16 bits.
        device: that it will compute on.

    Raises:
        UserError: if the base cannot be loaded.
    """
    torch.manual_seed(seed)
    base = options.base
    model = T5VAE(settings) if base is None else T5VAE.from_base(settings, base)
    if half and device.type == "cpu":
        # On a CPU torch's fused attention is slower in half precision than the plain one.
        model.set_attn_implementation("eager")
    if not half and device.type == "cuda":
        # In TF32. torch.compile still reads this setting, not only the newer fp32_precision.
        torch.backends.cuda.matmul.allow_tf32 = True
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if options.compile:
        model.compile_layers()
    fused = options.fused_cross_entropy
    possible = device.type == "cuda" and is_installed("liger-kernel")
    model.fused_cross_entropy = possible if fused is None else fused
    return model


def check_base(base: str | None, dataset: Dataset | None) -> None:
    """Refuse a base whose tokenizer is not the shards'.

    Raises:
        UserError: if it is another.
    """
    if base is not None and dataset is not None:
        check_tokenizer(base, dataset.tokenizer(), dataset.path)


def is_installed(package: str) -> bool:
    """Whether a package can be imported, by its name on PyPI."""
    return find_spec(package.replace("-", "_")) is not None
