"""Losses and gradients of DeepSpeed ranks against one process on the whole global batch.

The tests start this file itself, once: it imports all there is to import and then forks 1, 2 and 4
ranks in turn, which go through all ZeRO stages and cases. The one process is plain PyTorch with an
fp64 model, and MMD by its formulas.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.multiprocessing.spawn import ProcessException, start_processes

from shards import Batch
from t5vae.cluster.process_group import free_port, start_process_group
from t5vae.cluster.ranks import Ranks
from t5vae.config import Config
from t5vae.model import T5VAE, Regularisers, row_keys
from t5vae.objective import Gathering, gathering, mmd, sliced_epps_pulley
from t5vae.training.build import model_config
from t5vae.training.deepspeed_settings import deepspeed_config
from t5vae.training.engine import backward, build_engine, set_learning_rate
from t5vae.training.step import Loss
from tests.objective import reference

ROOT = Path(__file__).parents[2]
WORLDS, STAGES = (1, 2, 4), (0, 1, 2, 3)
ROWS, LONGEST, VOCABULARY = 8, 16, 40  # rows of a micro step, over all ranks
SEED, POSITION, CPU = 3, 64, torch.device("cpu")
SMALL = {"t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}}
SMALL |= {"vocab_size": VOCABULARY, "sequence_length": LONGEST, "latent_size": 6, "token_size": 4}
MIXED = [5, 16, 2, 9, 3, 12, 7, 2]
NOISE = {"latent_noise": 0.5, "input_mask": 0.2, "word_dropout": 0.2}
PARTS = ("nll", "mmd", "epps_pulley", "kl")
EPPS_PULLEY = {"epps_pulley": {"weight": 30.0, "slices": 16}}


@dataclass(frozen=True)
class Model:
    """What an engine is built for."""

    bottleneck: str = "flatten"
    tied: bool = True
    accumulation: int = 1
    posterior: str | None = None


@dataclass(frozen=True)
class Case:
    """A step: `lengths` of all rows of each micro step in turn, and which rows do not count."""

    model: str = "flatten"
    weight: float = 10.0
    lengths: list[int] = field(default_factory=lambda: MIXED)
    left_out: tuple[int, ...] = ()
    objective: dict[str, Any] = field(default_factory=dict)


MODELS = {
    "flatten": Model(),
    "attention": Model("attention", tied=False),
    "accumulated": Model(accumulation=4),
    "posterior": Model(accumulation=2, posterior="gaussian"),
}
CASES = {
    "whole": Case(),
    "reconstruction alone": Case(weight=0.0),
    "mmd above all": Case(weight=1e4),
    "reconstruction summed": Case(objective={"reconstruction": "sum"}),
    "epps-pulley too": Case(left_out=(0, 2, 3), objective=EPPS_PULLEY),
    "2 or 16 tokens": Case(weight=1.0, lengths=[2] * 4 + [16] * 4),
    "rows that do not count": Case(left_out=(0, 2, 3)),  # of four ranks the second has none
    "noise": Case(objective=NOISE),
    "attention": Case("attention", objective={"latent_noise": 0.5}),
    "accumulation 4": Case(
        "accumulated",
        lengths=MIXED + [16] * 8 + [2] * 8 + MIXED[::-1],
        left_out=(1, 17, 18, 19, 20),
        objective={**NOISE, **EPPS_PULLEY, "mmd": {"prior": "sampled", "kernel": "multi_rbf"}},
    ),
    "kl": Case("posterior", lengths=MIXED * 2, objective={"kl": {"weight": 1.0}}),
    "kl with free bits, summed": Case(
        "posterior",
        weight=0.0,
        lengths=MIXED + [2] * 8,
        left_out=(0, 2, 3, 9),
        objective={**NOISE, "reconstruction": "sum", "kl": {"weight": 3.0, "free_bits": 0.02}},
    ),
    "accumulation 4, mmd above all": Case(
        "accumulated", weight=1e4, lengths=MIXED * 2 + [2] * 8 + [16] * 8
    ),
}


def make_config(case: Case, stage: int = 0, world: int = 1, precision: str = "fp32") -> Config:
    model = MODELS[case.model]
    zero = {
        "zero_optimization": {
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": "auto",
        }
    }  # shard small ones too
    return Config(
        run={"seed": SEED},
        data={
            "shards": "none",
            "global_batch_size": ROWS * model.accumulation,
            "micro_batch_size": ROWS // world,
        },
        model={
            **SMALL,
            "bottleneck": model.bottleneck,
            "memory_length": 3,
            "posterior": model.posterior,
            "normalize": model.posterior is None,
        },
        objective=case.objective,
        optim={"name": "adamw", "gradient_clipping": 0},
        train={"precision": precision},
        deepspeed={"zero_stage": stage, "config": zero if stage == 3 else {}},
    )


def make_model(case: Case) -> T5VAE:
    config = make_config(case)
    settings = model_config(config.model, config.objective, None)
    settings.tie_word_embeddings = MODELS[case.model].tied
    torch.manual_seed(SEED)
    model = T5VAE(settings)
    with torch.no_grad():
        model.bottleneck.to_latent.weight *= 3  # codes that are about as wide as the prior
    return model


def micro_batches(case: Case, rank: int = 0, world: int = 1) -> list[Batch]:
    """A rank's share of every micro step, padded to its own longest row."""
    rows = len(case.lengths)
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.tensor(case.lengths)
    place = torch.arange(LONGEST)
    ids = torch.randint(3, VOCABULARY, (rows, LONGEST), generator=generator)
    ids[place == lengths[:, None] - 1] = 1
    ids[place >= lengths[:, None]] = 0
    weights = torch.ones(rows)
    weights[list(case.left_out)] = 0
    number = torch.randperm(1000, generator=generator)[:rows]
    batches = []
    for first in range(rank * ROWS // world, rows, ROWS):
        own = slice(first, first + ROWS // world)
        longest = int(lengths[own].max())
        batches.append(
            Batch.of(
                ids[own, :longest], lengths[own], weights[own], number[own], number[own] % 2, 0
            )
        )
    return batches


def all_tokens(batches: list[Batch]) -> float:
    return sum(float((batch.lengths * batch.weights).sum()) for batch in batches)


def mmd_options(config: Config) -> dict[str, Any]:
    return config.objective.mmd.model_dump(include={"kernel", "prior", "estimator", "sigma"})


def draw(batch: Batch, micro: int) -> dict[str, Any]:
    """The rows that count in a micro step, and what seeds its draws."""
    return {"weights_B": batch.weights, "generator_seed": (SEED << 40) + POSITION + micro}


@dataclass
class Found:
    """What one step gave, by micro step, and the gradient of every parameter."""

    nll: list[float]
    mmd: list[float]
    epps_pulley: list[float]
    kl: list[float]
    gradients: dict[str, Tensor]


@lru_cache
def one_process(name: str) -> Found:
    """A case as its definition says, by autograd on the whole batch."""
    case = CASES[name]
    config, model = make_config(case), make_model(case).double().train()
    objective = config.objective
    batches = micro_batches(case)
    share = 1 if objective.reconstruction == "sum" else 1 / all_tokens(batches)
    found = Found([], [], [], [], {})
    for micro, batch in enumerate(batches):
        noise = Regularisers(
            row_keys(SEED, POSITION, batch.sequence + (batch.source << 40)),
            objective.latent_noise,
            objective.input_mask,
            objective.word_dropout,
        )
        output = model(batch.ids, mode="score", regularisers=noise)
        nll = (output.nll.double() * batch.weights).sum()
        drawn = draw(batch, micro)
        squared = reference.terms(output.latent, **mmd_options(config), **drawn).value
        loss = nll * share + case.weight * squared / len(batches)
        epps_pulley = torch.zeros(())
        if objective.epps_pulley.weight:
            slices = objective.epps_pulley.slices
            epps_pulley = sliced_epps_pulley(output.latent, slices=slices, **drawn)
            loss = loss + objective.epps_pulley.weight * epps_pulley / len(batches)
        kl_BD = torch.zeros(ROWS, 1)
        if objective.kl.weight:
            mean_BD, log_variance_BD = output.mean.double(), output.log_variance.double()
            kl_BD = (mean_BD**2 + log_variance_BD.exp() - 1 - log_variance_BD) / 2
            floored_BD = kl_BD.clamp(min=objective.kl.free_bits) * batch.weights[:, None]
            loss = loss + objective.kl.weight * floored_BD.sum() * share
        loss.backward()
        found.kl.append((kl_BD * batch.weights[:, None]).sum().item())
        found.nll.append(nll.item())
        found.mmd.append(squared.item())
        found.epps_pulley.append(epps_pulley.item())
    found.gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    return found


# What a rank runs.


def make_engine(case: Case, stage: int, world: int, precision: str = "fp32") -> Any:
    config = make_config(case, stage, world, precision)
    settings = deepspeed_config(config.deepspeed, config.optim, precision, config.data.split(world))
    return build_engine(make_model(case), settings, config.optim)


def rank_step(engine: Any, name: str, stage: int) -> dict[str, Any]:
    """A step through the product, but for its update."""
    from deepspeed.utils import safe_get_full_grad

    case, rank, world = CASES[name], dist.get_rank(), dist.get_world_size()
    config, batches = make_config(case, stage, world), micro_batches(case, rank, world)
    tokens = all_tokens(micro_batches(case))
    loss = Loss(config.objective, SEED, config.data.split(world), CPU)
    weights = config.objective.weights(0, 1) | {"mmd": case.weight}
    counting = [batch.weights.view(world, -1).numpy() > 0 for batch in micro_batches(case)]
    loss.begin(POSITION, tokens, weights, counting if case.left_out else None)
    with recorded(engine) as events:
        for micro, batch in enumerate(batches):
            if micro:
                engine.step()
            backward(engine, loss(engine, batch, micro))
    gradients = {
        key: safe_get_full_grad(parameter).detach().clone()
        for key, parameter in engine.module.named_parameters()
    }
    set_learning_rate(engine, 0.0)
    engine.step()  # only forgets the gradients
    afterwards = [
        mmd(codes_BD, **mmd_options(config), **draw(batch, micro)).item()
        for micro, (codes_BD, batch) in enumerate(zip(loss.codes, batches, strict=True))
    ]
    numbers_ML = torch.stack(loss.numbers)
    shares_MS = numbers_ML[:, : loss.shares].contiguous()
    dist.all_reduce(shares_MS)
    numbers_ML[:, : loss.shares] = shares_MS
    of_logs = dict(zip(loss.logs, numbers_ML.T.tolist(), strict=False))
    found = {name: of_logs.get(name, [0.0] * len(batches)) for name in PARTS}
    return {**found, "gradients": gradients, "events": events, "afterwards": afterwards}


@contextmanager
def recorded(engine: Any) -> Iterator[list[str]]:
    """The order of gather and decoder, while micro steps run."""
    events: list[str] = []
    gather, everyone = gathering.all_gather, Gathering.everyone

    class Work:
        def __init__(self, work: dist.Work):
            self.work = work

        def wait(self) -> None:
            events.append("gather awaited")
            self.work.wait()

    def starting(*arguments: Any, **options: Any) -> Work:
        events.append("gather starts")
        return Work(gather(*arguments, **options))

    def finishing(codes: Gathering) -> Tensor:
        events.append("finish")
        return everyone(codes)

    decoder = engine.module.t5.decoder
    hooks = [
        decoder.embed_tokens.register_forward_pre_hook(lambda *_: events.append("decoder starts")),
        decoder.final_layer_norm.register_forward_hook(lambda *_: events.append("decoder ends")),
    ]
    with (
        patch.object(gathering, "all_gather", starting),
        patch.object(Gathering, "everyone", finishing),
    ):
        yield events
    for hook in hooks:
        hook.remove()


def backward_collectives(engine: Any, batch: Batch) -> dict[str, dict[str, int]]:
    """How many collectives `engine.backward` calls, by kind, in micro steps with three losses."""
    go_back = engine.backward
    found: dict[str, dict[str, int]] = {}

    def counted(name: str) -> Callable[[Tensor], None]:
        def call(loss: Tensor) -> None:
            with CommDebugMode() as collectives:
                go_back(loss)
            found[name] = {str(kind): n for kind, n in collectives.get_comm_counts().items()}

        return call

    config = make_config(CASES["whole"])
    loss = Loss(config.objective, SEED, config.data.split(1), CPU)
    loss.begin(POSITION, 1.0, {"mmd": 10.0})
    with patch.object(engine, "backward", counted("with mmd")):
        backward(engine, loss(engine, batch, 0))
    engine.step()
    counted("without")(engine(batch.ids, mode="score").nll.sum())
    engine.step()
    output = engine(batch.ids, mode="score")
    everyone = torch.distributed.nn.functional.all_gather(output.latent)
    counted("with a gather that has a gradient")(output.nll.sum() + sum(everyone).sum())
    engine.step()
    return found


def lost_in_sums(stage: int, rank: int, world: int) -> float:
    """The relative error of the sum of bf16 gradients over micro steps and ranks."""
    from deepspeed.utils import safe_get_full_grad

    case = CASES["accumulation 4"]
    engine = make_engine(case, stage, world, "bf16")
    engine.train()
    exact: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        exact[name] = exact.get(name, 0) + gradient.double()

    parameters = dict(engine.module.named_parameters())
    for name, parameter in parameters.items():
        parameter.register_hook(partial(add, name))
    for micro, batch in enumerate(micro_batches(case, rank, world)):
        if micro:
            engine.step()
        engine.backward(engine(batch.ids, mode="score").nll.sum())
    errors, norms = [], []
    for name, gradient in exact.items():
        dist.all_reduce(gradient)
        gradient /= world
        errors.append((safe_get_full_grad(parameters[name]) - gradient).norm())
        norms.append(gradient.norm())
    return (torch.stack(errors).norm() / torch.stack(norms).norm()).item()


def rank_main(rank: int, world: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    start_process_group(Ranks(rank, world, rank, world, "127.0.0.1", port))
    results: dict[Any, Any] = {}
    for stage in STAGES:
        for model in MODELS:
            names = [name for name, case in CASES.items() if case.model == model]
            engine = make_engine(CASES[names[0]], stage, world)
            engine.train()
            if stage == 3:
                assert not any(p.numel() for p in engine.module.parameters()), "not sharded"
            for name in names:
                results[stage, name] = rank_step(engine, name, stage)
            if stage == 0 and model == CASES["whole"].model:
                batch = micro_batches(CASES["whole"], rank, world)[0]
                results["backward"] = backward_collectives(engine, batch)
        if stage:  # without ZeRO, micro steps are summed in bf16
            results["lost in sums", stage] = lost_in_sums(stage, rank, world)
    torch.save(results, folder / f"{rank} of {world}.pt")
    dist.destroy_process_group()


def main(folder: Path) -> None:
    import deepspeed  # noqa: F401 (ranks that are forked need not)

    for world in WORLDS:
        arguments = (world, free_port(), folder)
        try:
            start_processes(rank_main, arguments, nprocs=world, start_method="fork")
        except ProcessException as error:
            print(f"{world} ranks: {error}", file=sys.stderr)


# What the tests compare.

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[Path, str]:
    """The folder of all ranks' results, and what they said."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    if sys.platform == "linux":  # elsewhere the loopback has another name
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, "-W", "ignore", __file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    return folder, done.stderr


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request, launched) -> list[dict]:
    """What each of 1, 2 or 4 ranks found."""
    folder, said = launched
    files = [folder / f"{rank} of {request.param}.pt" for rank in range(request.param)]
    assert all(file.exists() for file in files), said[-3000:]
    return [torch.load(file) for file in files]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_ranks_give_the_losses_and_gradients_of_one_process(ranks, stage, name):
    expected = one_process(name)
    for results in ranks:
        found = results[stage, name]
        for part in PARTS:
            assert found[part] == ranks[0][stage, name][part], part
            assert found[part] == pytest.approx(getattr(expected, part), rel=1e-5, abs=1e-7), part
        assert found["gradients"].keys() == expected.gradients.keys()
        for key, gradient in expected.gradients.items():
            error = (found["gradients"][key].double() - gradient).norm()
            assert error <= 1e-5 * gradient.norm(), (key, error / gradient.norm())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_codes_travel_while_the_decoder_runs_and_give_the_value_of_a_gather_afterwards(
    ranks, stage, name
):
    order = ["gather starts", "decoder starts", "decoder ends", "finish", "gather awaited"]
    if len(ranks) == 1:
        order = order[1:-1]
    for results in ranks:
        found = results[stage, name]
        assert found["events"] == order * MODELS[CASES[name].model].accumulation
        assert found["mmd"] == found["afterwards"]


def test_backward_calls_no_collective_for_the_mmd(ranks):
    for results in ranks:
        found = results["backward"]
        assert found["with mmd"] == found["without"]
        if len(ranks) > 1:  # the count counts
            assert found["without"]
            gathered = found["with a gather that has a gradient"]
            assert sum(gathered.values()) > sum(found["without"].values())


@pytest.mark.parametrize("stage", STAGES[1:])
def test_gradients_in_bf16_are_summed_in_fp32(ranks, stage):
    for results in ranks:
        assert results["lost in sums", stage] < 1e-6


if __name__ == "__main__":
    main(Path(sys.argv[1]))
