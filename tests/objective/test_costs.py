"""What terms say that they cost, against torch's own count of products, and what it allocates."""

from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from t5vae.objective import blocked, discrepancy, mmd_of, sliced_epps_pulley
from t5vae.objective.gathering import Gathering
from t5vae.objective.kernels import make_kernel
from t5vae.objective.terms.epps_pulley import EppsPulley
from t5vae.objective.terms.mmd import MMD

ROWS, EVERY, LATENT = 48, 96, 40


def test_mmd_costs_two_products_of_a_ranks_rows_and_all_codes():
    x_BD, y_ND = torch.randn(ROWS, LATENT), torch.randn(EVERY, LATENT)
    with FlopCounterMode(display=False) as counted:
        blocked.pair_sum(x_BD, y_ND, make_kernel("imq", LATENT))
    cost = MMD().cost(ROWS, EVERY, LATENT, accelerated=False)
    norms = 4 * ROWS * EVERY  # ride on the product of distances; torch does not count the other one
    assert counted.get_total_flops() == cost.operations / 2 + norms


def test_epps_pulley_costs_its_projections_beside_its_powers():
    with FlopCounterMode(display=False) as counted:
        sliced_epps_pulley(torch.randn(ROWS, LATENT), slices=16, axes=False)
    without = EppsPulley(slices=16, axes=False).cost(ROWS, ROWS, LATENT, accelerated=False)
    powers = 16 * 16 * 16 * ROWS
    assert counted.get_total_flops() == without.operations - powers


def storages(tree):
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [tensor.untyped_storage() for tensor in tensors]


class Held(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that are still there.

    Attributes:
        most: that there were at once.
    """

    def __init__(self):
        super().__init__()
        self.made, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(result):
            if storage._cdata not in given:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        there = [size for reference, size in self.made.values() if not reference.expired()]
        self.most = max(self.most, sum(there))
        return result


@pytest.mark.parametrize("rows", [96, 32])
def test_mmd_holds_the_codes_of_all_ranks_and_copies_of_them(monkeypatch, rows):
    every, latent = 96, 512
    z_BD = torch.randn(rows, latent, dtype=torch.bfloat16, requires_grad=True)
    monkeypatch.setattr(discrepancy.dist, "all_reduce", lambda value, group: None)
    arrived = SimpleNamespace(wait=lambda: None)
    with Held() as held:
        gathering = Gathering(z_BD, None, None, None, torch.randn(every, latent), arrived)
        mmd_of(gathering, kernel="imq", gradient_scale=1.0)
    cost = MMD().cost(rows, every, latent, accelerated=False)
    assert held.most == pytest.approx(cost.memory, rel=0.02)
    assert cost.sent == 4 * every * latent
