"""DeepSpeed's configuration: ours, the user's own, and what neither may ask for."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from t5vae.common.errors import UserError, first_line
from t5vae.common.kinds import OPTIMISERS, find
from t5vae.config import BatchSplit, DeepSpeed, Optim
from t5vae.training.optimisers import Optimiser


def deepspeed_config(
    deepspeed: DeepSpeed, optim: Optim, precision: str | None, split: BatchSplit
) -> dict[str, Any]:
    """DeepSpeed's configuration: ours, over the user's own, over what we prefer to its defaults.

    "auto" in the user's own, which transformers would fill in, is ours where we have a value, and
    else left to DeepSpeed.

    More than two gradients in bf16 are summed in fp32, over ranks and over micro steps, unless the
    user says otherwise: each sum in bf16 is rounded to 8 bits, as a sum of two has to be anyway.

    Raises:
        UserError: where the user's own contradicts ours, with both values, or is not readable.
    """
    optimiser: type[Optimiser] = find(OPTIMISERS, optim.name)
    clipping = optim.gradient_clipping
    if clipping is None:
        clipping = 1.0 if optimiser.knows_gradient_norm else 0.0
    offloaded = {
        "offload_optimizer": deepspeed.offload_optimizer,
        "offload_param": deepspeed.offload_parameters,
    }
    ours: dict[str, Any] = {
        "train_batch_size": split.sequences,
        "train_micro_batch_size_per_gpu": split.micro,
        "gradient_accumulation_steps": split.accumulation,
        "gradient_clipping": clipping,
        "zero_optimization": {
            "stage": deepspeed.zero_stage,
            **{name: {"device": "cpu"} for name, wanted in offloaded.items() if wanted},
        },
        # The optimiser is handed to DeepSpeed as an object.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if optimiser.gathers and deepspeed.zero_stage == 3:
        ours["zero_optimization"]["reduce_scatter"] = False
    theirs = _user_config(deepspeed.config)
    for kind in ("bf16", "fp16"):
        if kind == precision or kind in theirs:
            ours[kind] = {"enabled": kind == precision}
    for name, instead in (("optimizer", "optim"), ("scheduler", "optim.schedule")):
        if name in theirs:
            raise UserError(
                f"deepspeed.config sets {name}, which would not be used: set {instead} in its place"
            )
    merged = _without_auto(_merge(theirs, ours))
    preferred: dict[str, Any] = {"steps_per_print": 2**31}
    if precision == "bf16" and split.parts > 2:
        preferred["communication_data_type"] = "fp32"
        if split.accumulation > 1 and deepspeed.zero_stage:
            merged["data_types"] = {"grad_accum_dtype": "fp32", **_object(merged, "data_types")}
    _refuse_unsupported(merged)
    return preferred | merged


def stage_of(settings: dict[str, Any]) -> int:
    """The ZeRO stage of DeepSpeed's configuration."""
    return settings["zero_optimization"]["stage"]


def is_half(settings: dict[str, Any]) -> bool:
    """Whether weights and activations have 16 bits."""
    return any(settings.get(kind, {}).get("enabled") for kind in ("bf16", "fp16"))


def _refuse_unsupported(merged: dict[str, Any]) -> None:
    """Refuse what DeepSpeed cannot do, or keeps where no checkpoint would find it."""
    for name in ("offload_optimizer", "offload_param"):
        if _object(merged["zero_optimization"], name).get("device") == "nvme":
            raise UserError(
                f"deepspeed.config sets zero_optimization.{name}.device to nvme, whose state no "
                "checkpoint has: use cpu"
            )
    accumulates = _object(merged, "data_types").get("grad_accum_dtype")
    if stage_of(merged) == 0 and is_half(merged) and accumulates == "fp32":
        raise UserError(
            "deepspeed.config sets data_types.grad_accum_dtype to fp32, which DeepSpeed does not "
            "do without ZeRO: set deepspeed.zero_stage to 1"
        )


def _object(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of DeepSpeed's configuration; empty where there is none.

    Raises:
        UserError: it is something else.
    """
    part = settings.get(name) or {}
    if not isinstance(part, dict):
        raise UserError(f"deepspeed.config sets {name} to {part!r}: give an object")
    return part


def _user_config(given: str | dict[str, Any] | None) -> dict[str, Any]:
    if not isinstance(given, str):
        return given or {}
    try:
        content = json.loads(Path(given).read_text(), object_pairs_hook=_once)
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed.config: {given} is not a readable JSON file: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"deepspeed.config: {given} holds no JSON object")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no key is given twice."""
    twice = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
    if twice:
        raise ValueError(f"{', '.join(twice)} is given twice: keep one")
    return dict(pairs)


def _merge(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    merged = dict(theirs)
    for key, value in ours.items():
        if key not in theirs or theirs[key] == "auto":
            merged[key] = value
        elif isinstance(value, dict) and isinstance(theirs[key], dict):
            merged[key] = _merge(theirs[key], value, f"{prefix}{key}.")
        elif theirs[key] != value:
            raise UserError(
                f"deepspeed.config sets {prefix}{key} to {theirs[key]!r}, but the run's "
                f"configuration makes it {value!r}; leave it out, or make them agree"
            )
    return merged


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that are "auto", at any depth."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value != "auto"
    }


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse a configuration that DeepSpeed does not take.

    Raises:
        UserError: with what DeepSpeed says first.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum

    try:
        if accumulates := _object(settings, "data_types").get("grad_accum_dtype"):
            DtypeEnum(accumulates)
        DeepSpeedConfig(settings)
    except ValidationError as error:
        first = error.errors()[0]
        told = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(f"DeepSpeed does not take deepspeed.config: {told}") from None
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        told = first_line(error)
        raise UserError(f"DeepSpeed does not take deepspeed.config: {told}") from None
