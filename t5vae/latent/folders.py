"""Where an exported model lies."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from shards.format.tokenizers import load_tokenizer
from t5vae.common.errors import UserError, first_line
from t5vae.model import T5VAE
from t5vae.model.files import load_weights, read_settings


def load_model(
    folder: Path, device: str | torch.device | None = None
) -> tuple[T5VAE, PreTrainedTokenizerBase]:
    """The model of an exported folder, on a device, and its tokenizer; see `LatentSpace.load`."""
    try:
        model = load_weights(folder)
    except Exception as error:  # transformers and safetensors raise a dozen kinds
        raise not_whole(folder, error) from error
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        model.to(torch.device(device))  # type: ignore[arg-type]
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {str(device)!r} here: {first_line(error)}") from None
    tokenizer = load_tokenizer(folder)
    pieces, vocabulary = max(tokenizer.get_vocab().values()) + 1, model.config.t5_config.vocab_size
    if pieces > vocabulary:
        reason = f"its tokenizer has {pieces:,} pieces, the model {vocabulary:,}"
        raise not_whole(folder, ValueError(reason))
    return model, tokenizer


def not_whole(folder: Path, error: Exception) -> UserError:
    """What is said of an export whose files are not what they should be."""
    return UserError(
        f"{folder} is not a whole export ({first_line(error)}); write it again with "
        "`t5vae export RUN`"
    )


def export_folder(given: Path) -> Path:
    """The folder with the model's files: `given` itself, or its `export/`."""
    if not given.is_dir():
        raise UserError(
            f"no folder {given}; give a run folder, or an export written by `t5vae export RUN`"
        )
    folder = given / "export" if (given / "export").is_dir() else given
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer_config.json")):
        raise UserError(f"{given} holds no exported model; write one with `t5vae export {given}`")
    try:
        kind = read_settings(folder)["model_type"]
    except (ValueError, KeyError):
        kind = None
    if kind != T5VAE.config_class.model_type:
        raise UserError(
            f"{folder} holds a model of type {kind!r}, not a T5VAE; give a run folder, or an "
            "export written by `t5vae export RUN`"
        )
    return folder
