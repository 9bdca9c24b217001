"""A model from files that anybody may have written: nothing named in them is loaded or run, and no
memory is taken before its size is known to be right.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from t5vae.common.files import head, parse_json
from t5vae.model.configuration import T5VAEConfig
from t5vae.model.modeling import T5VAE

CONFIG = "config.json"


def read_settings(folder: Path) -> dict[str, Any]:
    """What the config.json of an exported model says.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is none.
    """
    settings = parse_json(head(folder / CONFIG))
    if not isinstance(settings, dict):
        raise ValueError(f"{CONFIG} holds no settings of a model")
    return settings


def known(settings: dict[str, Any]) -> T5VAEConfig:
    """A model's configuration from what is ours of some settings; transformers adds its own, of
    which some name code.

    Raises:
        ValueError, TypeError: they do not describe a model.
    """
    names = T5VAEConfig.__annotations__
    return T5VAEConfig(**{name: settings[name] for name in names if name in settings})


def weight_files(folder: Path) -> list[Path]:
    """What holds the weights of an exported model."""
    return sorted(filter(Path.is_file, folder.glob("*.safetensors")))


def load_weights(folder: Path) -> T5VAE:
    """An exported model, on the CPU, in the precision of its weights.

    Raises:
        OSError, SafetensorError: there is none, or it cannot be read.
        ValueError, TypeError: its files do not go together.
    """
    config, weights = known(read_settings(folder)), dict[str, Tensor]()
    for file in weight_files(folder):
        weights |= load_file(file)
    check(config, {name: tuple(weight.shape) for name, weight in weights.items()})
    dtypes = {weight.dtype for weight in weights.values()}
    # Of a folder's name transformers would look for adapters and code as well.
    return T5VAE.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtypes.pop() if len(dtypes) == 1 else None
    )


def check(config: T5VAEConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a configuration that is not the one of some weights, before a model of it is made.

    Args:
        config: of the model.
        shapes: of the weights, by their names; flattened ones will do.

    Raises:
        ValueError, TypeError: naming what is not right.
    """
    t5 = config.t5_config
    if t5.num_layers + t5.num_decoder_layers > len(shapes):
        raise ValueError(f"{len(shapes)} weights are there, fewer than layers")
    for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
        token = getattr(t5, name, None)
        is_left_out = token is None and name == "decoder_start_token_id"
        if not is_left_out and token not in range(t5.vocab_size):
            raise ValueError(f"{name} is {token!r}, which is no piece's")
    with torch.device("meta"):
        model = T5VAE(config)
    for name, parameter in model.named_parameters():
        if name not in shapes:
            raise ValueError(f"{name} is missing")
        shape, wanted = shapes[name], tuple(parameter.shape)
        if shape not in (wanted, (parameter.numel(),)):
            raise ValueError(f"{name} has the shape {list(shape)}, not {list(wanted)}")
