"""Two DeepSpeed ranks against one process: every mode, generation and a training step.

The tests start this file itself, once for each rank.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters

from t5vae.cluster.process_group import free_port, start_process_group
from t5vae.cluster.ranks import Ranks
from t5vae.model import T5VAE, T5VAEConfig

WORLD = 2
LENGTHS = [[9, 3, 7], [6, 1, 2, 6, 5]]  # of each rank's sequences
LONGEST = [10, 6]  # tokens that each rank generates at most
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
T5 |= {"dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
SIZES = {"latent_size": 6, "sequence_length": 9, "token_size": 5, "memory_length": 3}
LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Run:
    """A model, how it is executed, and the ranks whose labels do not count."""

    bottleneck: str = "flatten"
    tied: bool = True
    stage: int = 3
    fused: bool = False
    compiled: bool = False
    left_out: tuple[int, ...] = ()


RUNS = {
    "flatten, tied": Run(),
    "flatten, untied": Run(tied=False),
    "attention, tied": Run("attention"),
    "attention, untied": Run("attention", tied=False),
    "fused, tied": Run(fused=True),
    "fused, untied": Run("attention", tied=False, fused=True),
    "fused, a rank without a token": Run(fused=True, left_out=(1,)),
    "compiled": Run(compiled=True),
    "compiled, not sharded": Run(stage=1, compiled=True),
}


def make_model(run: Run) -> T5VAE:
    """One whose random weights listen to the code."""
    torch.manual_seed(0)
    config = T5VAEConfig(t5=T5, bottleneck=run.bottleneck, tie_word_embeddings=run.tied, **SIZES)
    model = T5VAE(config)
    with torch.no_grad():
        for block in model.t5.decoder.block:
            block.layer[1].EncDecAttention.o.weight *= 8
    return model


def own_batch(rank: int) -> tuple[Tensor, Tensor]:
    """Sequences [B, T] and codes [B, D] of a rank."""
    generator = torch.Generator().manual_seed(rank)
    lengths_B = torch.tensor(LENGTHS[rank])[:, None]
    rows, longest = len(lengths_B), int(lengths_B.max())
    ids_BT = torch.randint(2, 50, (rows, longest), generator=generator)
    place = torch.arange(longest)
    ids_BT[place == lengths_B - 1] = 1
    z_BD = 3 * torch.randn(rows, SIZES["latent_size"], generator=generator)
    return ids_BT.masked_fill(place >= lengths_B, 0), z_BD


def loss_of(call: Callable[..., Any], run: Run, rank: int) -> Tensor:
    ids_BT, _ = own_batch(rank)
    labels_BT = torch.full_like(ids_BT, -100) if rank in run.left_out else ids_BT
    return call(ids_BT, labels=labels_BT, mode="score").loss


@torch.no_grad()
def all_modes(
    call: Callable[..., Any], model: T5VAE, run: Run, rank: int, synced_gpus: bool = False
) -> dict[str, Tensor]:
    """What every mode and `generate` give a rank, under `call` of the model or of its engine."""
    ids_BT, z_BD = own_batch(rank)
    model.eval()
    found = {
        "encode": call(ids_BT, mode="encode"),
        "expand": call(latent=z_BD, mode="expand"),
        "score": call(ids_BT, mode="score").nll,
        "decode": call(ids_BT, labels=ids_BT).logits,
    }
    if not run.compiled:  # it would compile much
        options = {"do_sample": False, "max_length": LONGEST[rank], "synced_gpus": synced_gpus}
        found["reconstruct"] = call(ids_BT, mode="reconstruct", **options)
        found["generate"] = model.generate(latent=z_BD, **options)
    model.train()
    return found


@dataclass
class Found:
    """What a rank found before and after a step, and in it."""

    before: dict[str, Tensor]
    loss: float
    gradients: dict[str, Tensor]
    after: dict[str, Tensor]


@lru_cache
def one_process(name: str) -> list[Found]:
    """Each rank's results, without DeepSpeed and with nothing fused or compiled."""
    run = RUNS[name]
    model, ranks = make_model(run), range(WORLD)
    before = [all_modes(model, model, run, rank) for rank in ranks]
    losses = [loss_of(model, run, rank) for rank in ranks]
    (sum(losses) / WORLD).backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    torch.optim.SGD(model.parameters(), LEARNING_RATE).step()
    after = [all_modes(model, model, run, rank) for rank in ranks]
    return [Found(before[r], losses[r].item(), gradients, after[r]) for r in ranks]


# What a rank runs.


def rank_found(run: Run, rank: int) -> Found:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    model = make_model(run)
    model.fused_cross_entropy = run.fused
    if run.compiled:
        compiling = partial(torch.compile, backend="eager", fullgraph=True)  # no code generation
        with patch.object(torch, "compile", compiling):
            model.compile_layers()
    zero = {"stage": run.stage, "stage3_param_persistence_threshold": 0}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), LEARNING_RATE),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
        },
    )

    def modes() -> dict[str, Tensor]:
        found = all_modes(engine, model, run, rank, synced_gpus=True)
        if run.stage == 3:
            assert not any(parameter.numel() for parameter in model.parameters()), "not sharded"
        return found

    before = modes()
    loss = loss_of(engine, run, rank)
    engine.backward(loss)
    gradients = {key: safe_get_full_grad(p).clone() for key, p in model.named_parameters()}
    engine.step()
    graphs = counters["stats"]["unique_graphs"]
    after = modes()
    assert counters["stats"]["unique_graphs"] == graphs, "compiled again"
    return Found(before, loss.item(), gradients, after)


def main(rank: int, folder: Path) -> None:
    port = int(os.environ["MASTER_PORT"])
    start_process_group(Ranks(rank, WORLD, rank, WORLD, "127.0.0.1", port))
    results = {}
    for name, run in RUNS.items():
        if not run.fused or find_spec("liger_kernel"):
            results[name] = vars(rank_found(run, rank))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


# What the tests compare.

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(run_ranks, tmp_path_factory) -> list[dict[str, Found]]:
    """What each rank found, by name of the run."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": "cpu",
        "TRITON_INTERPRET": "1",
        "TORCHDYNAMO_DISABLE": "0",
    }
    run_ranks(__file__, WORLD, folder, **environment)
    files = [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]
    return [{name: Found(**found) for name, found in file.items()} for file in files]


def found_by(ranks: list[dict[str, Found]], name: str) -> list[Found]:
    if RUNS[name].fused:
        pytest.importorskip("liger_kernel", reason="Triton has no build for this platform")
    return [found[name] for found in ranks]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", RUNS)
def test_every_mode_gives_each_rank_what_the_model_alone_gives_before_and_after_a_step(
    ranks, name, when
):
    for found, right in zip(found_by(ranks, name), one_process(name), strict=True):
        torch.testing.assert_close(getattr(found, when), getattr(right, when), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_a_step_has_the_loss_and_gradients_of_one_process(ranks, name):
    for found, right in zip(found_by(ranks, name), one_process(name), strict=True):
        assert found.loss == pytest.approx(right.loss, rel=1e-5)
        assert found.gradients.keys() == right.gradients.keys()
        for key, gradient in right.gradients.items():
            error = (found.gradients[key] - gradient).norm()
            assert error <= 1e-5 * gradient.norm(), (key, error / gradient.norm())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
