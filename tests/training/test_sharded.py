"""Weights at ZeRO stage 3: those of any other stage, drawn on the CPU whatever the accelerator.

A rank of its own, which is this file run as a script, draws them. Its accelerator is first the CPU,
then one that is not there: tensors without content stand for those that it would hold.
"""

import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from t5vae.cluster.process_group import start_process_group
from t5vae.cluster.ranks import Ranks
from t5vae.model import T5VAE, T5VAEConfig
from t5vae.training.engine import sharded
from tests.launching import T5, free_port

ROOT = Path(__file__).parents[2]
PRECISIONS = ("fp32", "bf16")
Draw = tuple[str, str, tuple[int, ...]]  # function, device, shape


def settings_of(precision: str) -> dict[str, Any]:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    return {
        "train_batch_size": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
    }


def make_model() -> nn.Module:
    torch.manual_seed(7)
    ids = {"vocab_size": 30, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return T5VAE(T5VAEConfig(t5={**T5, **ids}, sequence_length=9, latent_size=8, token_size=4))


def weights_of(settings: dict[str, Any] | None) -> dict[str, Tensor]:
    if settings is None:
        return {name: weight.detach() for name, weight in make_model().named_parameters()}
    from deepspeed.runtime.zero import GatheredParameters

    with sharded(settings, pretrained=False):
        model = make_model()
    assert not any(weight.numel() for weight in model.parameters()), "not sharded"
    with GatheredParameters(model.parameters()):
        return {name: weight.detach().clone() for name, weight in model.named_parameters()}


class Recorded(TorchDispatchMode):
    """What would be drawn from a generator, in place; copies have no content either."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Draw] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            where = {"dtype": kwargs.get("dtype"), "device": kwargs.get("device")}
            return torch.empty_like(*args, **where)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.draws.append((str(func), args[0].device.type, tuple(args[0].shape)))
            return args[0]
        return func(*args, **kwargs)


class Moved(TorchFunctionMode):
    """Parameters without content whose data are replaced lie where the new ones do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func == Tensor.data.__set__:
            args[0].fake_device = args[1].device
        return result


def draws_of(settings: dict[str, Any] | None) -> tuple[list[Draw], set[str]]:
    """What a model draws where the accelerator is called cuda, and where its weights are then."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.runtime.zero import Init

    def move(self: Init, module: nn.Module) -> None:
        for weight in module.parameters(recurse=False):
            weight.data = weight.data.to(self.local_device)

    with (
        patch.object(Init, "_post_init_method", move),  # instead of dealing them out
        patch.object(CPU_Accelerator, "device_name", lambda *_: "cuda:0"),
        patch.object(CPU_Accelerator, "set_device"),
        FakeTensorMode(allow_non_fake_inputs=True),
        Recorded() as recorded,
        Moved(),
        torch.no_grad(),
    ):
        if settings is None:
            model = make_model()
        else:
            with sharded(settings, pretrained=False):
                model = make_model()
    return recorded.draws, {weight.device.type for weight in model.parameters()}


def main(rank: int, folder: Path) -> None:
    start_process_group(Ranks(rank, 1, rank, 1, "127.0.0.1", int(os.environ["MASTER_PORT"])))
    whole: list[Any] = [None, *map(settings_of, PRECISIONS)]
    names = ["whole", *PRECISIONS]
    found = {
        "weights": dict(zip(names, map(weights_of, whole), strict=True)),
        "draws": dict(zip(names, map(draws_of, whole), strict=True)),
    }
    torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


# What the tests compare.

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found(run_ranks, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sharded")
    run_ranks(
        __file__,
        1,
        folder,
        MASTER_PORT=str(free_port()),
        DS_ACCELERATOR="cpu",
        PYTHONPATH=str(ROOT),
    )
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_that_are_dealt_out_are_those_of_any_other_stage(found, precision):
    whole, dealt = (found["weights"][name] for name in ("whole", precision))
    assert whole.keys() == dealt.keys()
    for name, weight in whole.items():
        assert dealt[name].equal(weight.to(dealt[name].dtype)), name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_with_an_accelerator_the_same_is_drawn_from_the_cpus_generator(found, precision):
    whole, _ = found["draws"]["whole"]
    dealt, places = found["draws"][precision]
    assert places == {"cuda"}
    assert len(dealt) > 50
    assert dealt == whole


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
