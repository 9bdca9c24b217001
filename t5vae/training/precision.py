"""Which numbers a run computes in, where its configuration does not say."""

from typing import Literal

import torch

from t5vae.config import Config


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has products of bf16 matrices; where they are emulated fp32 is faster."""
    if device.type == "cpu":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


def native_precision(device: torch.device) -> Literal["bf16", "fp32"]:
    """bf16 where the device multiplies in it."""
    return "bf16" if multiplies_bf16(device) else "fp32"


def settled(config: Config, precision: Literal["bf16", "fp32"]) -> Config:
    """The configuration with this precision if it has none."""
    if config.train.precision is not None:
        return config
    train = config.train.model_copy(update={"precision": precision})
    return config.model_copy(update={"train": train})
