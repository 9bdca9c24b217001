"""Which weights an optimiser takes and how, and optimisers from outside."""

from collections import Counter

import pytest
import torch

from t5vae.common.errors import UserError
from t5vae.common.kinds import OPTIMISERS
from t5vae.config import Config, Optim
from t5vae.model import T5VAE, T5VAEConfig
from t5vae.training.deepspeed_settings import deepspeed_config
from t5vae.training.engine import _optimizer
from t5vae.training.optimisers import Optimiser, Place


def place(ranks: int = 1) -> Place:
    return Place(ranks, on_cpu=True, offloaded=False)


def built(name: str, world_size: int = 1) -> tuple[T5VAE, torch.optim.Optimizer]:
    t5 = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    model = T5VAE(T5VAEConfig(t5=t5, latent_size=4, sequence_length=6, bottleneck="flatten"))
    optim = Optim(name=name, lr=1e-3, muon_lr=2e-3, weight_decay=0.5)
    return model, _optimizer(model, optim, place(world_size))


def groups(name: str, world_size: int = 1) -> tuple[T5VAE, list[dict]]:
    model, optimizer = built(name, world_size)
    return model, optimizer.param_groups


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_weight_is_optimised_once_and_decay_falls_on_matrices_alone(name):
    model, found = groups(name)
    ids = [id(parameter) for group in found for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.parameters())
    for group in found:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.5 if parameter.dim() >= 2 else 0.0)


def test_muon_takes_the_matrices_and_adamw_embeddings_norms_and_biases():
    model, found = groups("muon")
    muon = {id(p) for group in found if group["use_muon"] for p in group["params"]}
    assert {group["full_lr"] for group in found if group["use_muon"]} == {2e-3}
    assert {group["full_lr"] for group in found if not group["use_muon"]} == {1e-3}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for parameter in model.parameters():
        expected = parameter.dim() >= 2 and id(parameter) not in embeddings
        assert (id(parameter) in muon) == expected


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_matrices_of_one_shape_are_dealt_to_the_ranks_in_turn(world_size):
    _, found = groups("muon", world_size)
    (matrices,) = (group["params"] for group in found if group["use_muon"])
    sizes = [tuple(sorted(matrix.shape)) for matrix in matrices]
    shares, rest = [], sizes
    for rank in range(world_size):
        share = -(-len(rest) // (world_size - rank))
        shares.append(Counter(rest[:share]))
        rest = rest[share:]
    for shape in set(sizes):
        numbers = [share[shape] for share in shares]
        assert max(numbers) - min(numbers) <= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device has it")
def test_lion_is_refused_where_deepspeed_has_none():
    with pytest.raises(UserError, match=r"optim\.name lion needs a CUDA device"):
        _optimizer(torch.nn.Linear(2, 2), Optim(name="lion"), place())


class Toy(Optimiser):
    """Gradient descent for embeddings; what else there is stays as it is."""

    knows_gradient_norm = False

    @staticmethod
    def takes(*, embedding, dimensions):
        return embedding

    def settings(self):
        return {"lr": 2 * self.optim.lr}

    def build(self, groups, place):
        return torch.optim.SGD([group for group in groups if group["own"]])


def test_an_optimiser_from_outside_is_one_entry_of_the_table(monkeypatch):
    monkeypatch.setitem(OPTIMISERS, "toy", Toy)
    model, optimizer = built("toy")
    (group,) = optimizer.param_groups
    embeddings = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    assert set(group["params"]) == embeddings
    assert (group["full_lr"], group["weight_decay"]) == (2e-3, 0.5)
    config = Config(data={"shards": "x", "global_batch_size": 64}, optim={"name": "toy"})
    ours = deepspeed_config(config.deepspeed, config.optim, "bf16", config.data.split(1))
    assert ours["gradient_clipping"] == 0
    before = {weight: weight.clone() for weight in model.parameters()}
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert {weight for weight in before if not weight.equal(before[weight])} == embeddings


def test_an_optimiser_that_no_entry_names_is_refused():
    with pytest.raises(ValueError, match="choose one of adamw, lion, muon"):
        Optim(name="toy")
