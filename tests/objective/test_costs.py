"""What terms say that they cost, against torch's own count of products."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from t5vae.objective import blocked, sliced_epps_pulley
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
