"""Where an exported model lies."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from shards.format.tokenizers import load_tokenizer
from t5vae.common.errors import UserError, first_line
from t5vae.model import T5VAE


def load_model(
    folder: Path, device: str | torch.device | None = None
) -> tuple[T5VAE, PreTrainedTokenizerBase]:
    """The model of an exported folder, on a device, and its tokenizer; see `LatentSpace.load`."""
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
    try:
        model.to(torch.device(device))  # type: ignore[arg-type]
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {str(device)!r} here: {first_line(error)}") from None
    return model, load_tokenizer(folder)


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
        kind = json.loads((folder / "config.json").read_text())["model_type"]
    except (ValueError, KeyError, TypeError):
        kind = None
    if kind != T5VAE.config_class.model_type:
        raise UserError(
            f"{folder} holds a model of type {kind!r}, not a T5VAE; give a run folder, or an "
            "export written by `t5vae export RUN`"
        )
    return folder
