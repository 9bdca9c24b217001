"""A micro step asks the device nothing, so that the host can run ahead of it.

Shapes and branches that data decide raise under torch's `FakeTensorMode`, which knows no data: what
runs there runs on an accelerator without waiting for it. `_packs` is taken away in half of the
cases, since accelerators compute with pads.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from shards import Batch, ShardStream
from t5vae.config import Config
from t5vae.model import T5VAE
from t5vae.training.build import build_model, model_config
from t5vae.training.step import Loss
from tests.small_runs import MODEL
from tests.training.questions import Questions

CPU = torch.device("cpu")
WORLD, ROWS = 2, 16
NOISE = {"latent_noise": 0.5, "input_mask": 0.1, "word_dropout": 0.1}
KERNELS = ["rbf", "multi_rbf", "imq", "legacy"]
PRIORS = ["normal", "uniform", "sampled"]
EPPS_PULLEY = {"epps_pulley": {"weight": 1.0, "slices": 4}}
EVERYTHING = {"mmd": {"estimator": "v", "prior": "sampled"}, **EPPS_PULLEY, **NOISE}
OF_POSTERIORS = {**EVERYTHING, "kl": {"weight": 1.0, "free_bits": 0.1, "schedule": "linear"}}
MODELS = {
    "flatten": {"bottleneck": "flatten"},
    "attention": {"bottleneck": "attention", "memory_length": 3},
    "pads too": {"mask_padding": False},
    "posterior": {"posterior": "gaussian", "normalize": False},
}


@pytest.fixture
def ranks() -> Iterator[None]:
    """A process group of ranks that are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    yield
    dist.destroy_process_group()


Step = Callable[[T5VAE, Batch], None]


def step_of(config: Config, counting: list[np.ndarray] | None = None) -> Step:
    """A micro step of training, forward and backward."""
    loss = Loss(config.objective, 0, config.data.split(WORLD), CPU)
    weights = dict.fromkeys(config.objective.computed, 1.0)

    def take(model: T5VAE, batch: Batch) -> None:
        loss.begin(0, 100.0, weights, counting)
        loss(model, batch, 0).backward()
        loss.end(1, True, torch.ones(()), {})

    return take


def started(config: Config) -> tuple[T5VAE, Batch]:
    dataset = config.data.open()
    settings = model_config(config.model, config.objective, dataset)
    model = build_model(settings, config.model, seed=0, half=config.train.half, device=CPU)
    pad_to = None if config.model.mask_padding else dataset.max_length
    with ShardStream(
        dataset, seed=0, global_batch_size=ROWS, world_size=WORLD, pad_to=pad_to
    ) as stream:
        return model.train(), next(stream)


@contextmanager
def fake(model: nn.Module, batch: Batch) -> Iterator[Batch]:
    """Weights and a batch without data; what was learned before, as constants, may have some."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    tensors[name] = None if tensor is None else mode.from_tensor(tensor)
        yield batch._with(mode.from_tensor)


def check(config: Config, counting: list[np.ndarray] | None = None) -> None:
    """A micro step asks nothing of real tensors, and can be taken on fake ones."""
    take, (model, batch) = step_of(config, counting), started(config)
    take(model, batch)  # what travels once has travelled
    with Questions() as questions:
        take(model, batch)
    assert questions.asked == []
    model.zero_grad()
    with fake(model, batch) as without_data:
        take(model, without_data)
    assert any(weight.grad is not None for weight in model.parameters())


@pytest.fixture(params=["packed", "padded"])
def way(request, monkeypatch) -> str:
    """As on a CPU, or as on an accelerator."""
    if request.param == "padded":
        monkeypatch.setattr(T5VAE, "_packs", lambda *_: False)
    return request.param


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_micro_step_asks_nothing(ranks, way, make_config, name, precision):
    objective = OF_POSTERIORS if name == "posterior" else EVERYTHING
    train = {"steps": 10, "precision": precision}
    check(make_config(objective=objective, model={**MODEL, **MODELS[name]}, train=train))


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_kernel_or_prior_asks(ranks, make_config, kernel, prior):
    check(make_config(objective={"mmd": {"kernel": kernel, "prior": prior}}))


@pytest.mark.parametrize("way", ["padded"], indirect=True)
def test_a_batch_without_pads_asks_nothing(ranks, way, make_config, monkeypatch):
    config = make_config(objective=EVERYTHING)
    model, batch = started(config)
    whole = Batch.of(
        batch.ids.clamp(min=5),
        *[torch.full_like(batch.lengths, batch.ids.shape[1])],
        batch.weights,
        batch.sequence,
        batch.source,
    )
    take = step_of(config)
    take(model, whole)
    with Questions() as questions:
        take(model, whole)
    assert questions.asked == []


def test_rows_that_do_not_count_ask_nothing(ranks, way, make_config):
    counting_WB = np.ones((WORLD, ROWS // WORLD), bool)
    counting_WB[0, 2] = counting_WB[1, 5] = False
    check(make_config(objective=EVERYTHING), [counting_WB])


ASKING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(x.isfinite().all()),
    "if": lambda x: 1 if x.isfinite().all() else 2,
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "assignment by a mask": lambda x: x.clone().__setitem__(x > 0, 0.0),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "to": lambda x: x.to("cpu"),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "tensor": lambda x: torch.tensor(1.0, device=x.device),
}


@pytest.mark.parametrize("name", ASKING)
def test_questions_are_noticed(name):
    with Questions() as questions:
        ASKING[name](torch.ones(3))
    assert questions.asked


def test_questions_in_backward_are_noticed():
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda gradient: gradient * bool(gradient.any()))
    with Questions() as questions:
        x.sum().backward()
    assert questions.asked


@pytest.mark.parametrize("name", ["item", "float", "bool", "if", "nonzero", "a mask", "tolist"])
def test_without_data_there_is_no_answer(name):
    with (
        FakeTensorMode(),
        pytest.raises((DataDependentOutputException, DynamicOutputShapeException, RuntimeError)),
    ):
        ASKING[name](torch.ones(3))
