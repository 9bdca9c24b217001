"""MMD^2 between the global batch of latent codes and the prior.

Shapes: b codes of this rank, N codes of the global batch, D latent size.

The codes of all data-parallel ranks are gathered without gradient; each rank computes the exact
gradient of its own rows from its row block [b, N] already in the forward pass, so the backward
pass communicates nothing. W ranks with b codes each give what one process with W*b codes gives.
"""

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from t5vae.common.devices import sent
from t5vae.objective import blocked
from t5vae.objective.gathering import Gathering, rows_that_count, start_gather
from t5vae.objective.gradient import with_gradient
from t5vae.objective.kernels import Kernel, make_kernel
from t5vae.objective.precision import true_fp32
from t5vae.objective.priors import CLOSED, draws

log = logging.getLogger(__name__)

PairSum = Callable[[Tensor, Tensor, Kernel, Tensor | None], tuple[Tensor, Tensor]]


def mmd(
    z_BD: Tensor,
    kernel: str = "multi_rbf",
    prior: str = "normal",
    estimator: str = "u",
    *,
    sigma: float = 1.0,
    weights_B: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    gradient_scale: float | None = None,
    generator_seed: int = 0,
    implementation: str = "blocked",
) -> Tensor:
    """MMD^2 (Gretton et al., JMLR 13, 2012, eq. 3 and 5) of the global batch of codes.

    Args:
        z_BD: this rank's codes, floating, [b, D]; b may differ between ranks.
        kernel: "rbf", "multi_rbf", "imq" or "legacy" (see `make_kernel`).
        prior: "normal", N(0, sigma^2 I), or "uniform", on (-sigma, sigma)^D, both in closed form;
            or "sampled": N draws of N(0, sigma^2 I).
        estimator: "u" (unbiased) or "v" (biased: its optimum shrinks the codes).
        sigma: the prior's scale; it sets the kernel's bandwidth too.
        weights_B: [b], 0 for rows that do not count and get no gradient, 1 for others, the default.
        group: the data-parallel ranks; default all, or this process alone where none is set up.
        gradient_scale: multiplies the gradient; default the number of ranks, which cancels the
            mean reduction of DeepSpeed and DDP.
        generator_seed: seeds the draws of prior "sampled"; must be the same on every rank.
        implementation: "blocked", on any device, or "triton", on a CUDA device.

    Returns:
        A float32 scalar, equal on every rank, with its gradient to `z_BD`; 0, and a warning in the
        log, where fewer than two rows of the global batch count.

    Raises:
        ValueError: before codes are communicated, for codes that are not finite or not [b, D]
            with b, D >= 1, one single code with estimator "u", or an unknown name.
    """
    options = {"kernel": kernel, "prior": prior, "estimator": estimator}
    _check_names(**options, implementation=implementation)
    if not z_BD.sum(dtype=torch.float64).isfinite():
        raise ValueError("codes are not finite")
    counting_WB = rows_that_count(z_BD, weights_B, group)
    if estimator == "u" and counting_WB.size < 2:
        raise ValueError('estimator "u" compares codes with each other: it needs at least 2')
    gathering = start_gather(z_BD, counting_WB=counting_WB, group=group)
    phi = make_kernel(kernel, z_BD.shape[1], sigma)
    return mmd_of(
        gathering,
        **options,
        sigma=sigma,
        gradient_scale=gradient_scale,
        generator_seed=generator_seed,
        implementation=implementation,
        exact=_sums_in_fp32(implementation, phi, z_BD.shape[1])
        and blocked.is_far(gathering.everyone(), phi, centred=prior != "sampled"),
    )


@true_fp32()
def mmd_of(
    gathering: Gathering,
    *,
    kernel: str = "multi_rbf",
    prior: str = "normal",
    estimator: str = "u",
    sigma: float = 1.0,
    gradient_scale: float | None = None,
    generator_seed: int = 0,
    implementation: str = "blocked",
    exact: bool = False,
) -> Tensor:
    """MMD^2 of codes that are being gathered; arguments and result as in `mmd`.

    Codes that are not finite make it NaN on every rank. Nothing here asks an accelerator.

    Args:
        exact: sum over pairs in float64, for codes so far out that float32 loses what the kernel
            sees, as `mmd` finds out. Without it distances there err by some 1e-7 |z|^2.
    """
    _check_names(kernel, prior, estimator, implementation)
    own_BD, everyone_ND = gathering.own(), gathering.everyone()
    count, dimensions = everyone_ND.shape
    if count < 2:
        log.warning("MMD is 0: fewer than two codes of the global batch count")
        return with_gradient(gathering.z_BD, own_BD.new_zeros(()), torch.zeros_like(gathering.z_BD))
    pair_sum = _pair_sum(implementation, exact=exact)
    phi = make_kernel(kernel, dimensions, sigma)
    pairs = count * (count - 1) if estimator == "u" else count**2

    with torch.autocast(gathering.z_BD.device.type, enabled=False):
        # The kernel's value at 0 cancels between the terms: all of them are taken minus 1.
        centre_D = everyone_ND.mean(0)
        total, pull_BD = pair_sum(
            own_BD if gathering.work else everyone_ND, everyone_ND, phi, centre_D
        )
        value, gradient_BD = total / pairs, pull_BD.mul_(4 / pairs)
        value += 0 * centre_D.sum()  # NaN where a code is not finite, whatever a kernel clamps
        if prior == "sampled":
            drawn_ND = sent(draws(count, dimensions, sigma, generator_seed), own_BD.device)
            total, pull_BD = pair_sum(own_BD, drawn_ND, phi, None)
            value -= 2 / count**2 * total
            gradient_BD.sub_(pull_BD, alpha=4 / count**2)
            value += pair_sum(gathering.share(drawn_ND), drawn_ND, phi, None)[0] / pairs
            constant = 0.0
        else:
            cross, of_prior = CLOSED[prior]
            total, slope_BD = cross(own_BD, phi.mixture(), sigma)
            value -= 2 / count * total
            gradient_BD.sub_(slope_BD, alpha=2 / count)
            constant = of_prior(dimensions, phi.mixture(), sigma)

    if gathering.work:
        dist.all_reduce(value, group=gathering.group)
    if gradient_scale is None:
        gradient_scale = dist.get_world_size(gathering.group) if gathering.work else 1
    gradient_BD *= gradient_scale
    gradient_BD = gathering.spread(gradient_BD)
    return with_gradient(gathering.z_BD, (value + constant).float(), gradient_BD)


def _check_names(kernel: str, prior: str, estimator: str, implementation: str) -> None:
    make_kernel(kernel, 1)
    for name, value, choices in (
        ("prior", prior, (*CLOSED, "sampled")),
        ("estimator", estimator, ("u", "v")),
        ("implementation", implementation, ("blocked", "triton")),
    ):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; choose {', '.join(choices)}")


def _pair_sum(implementation: str, *, exact: bool) -> PairSum:
    if exact:
        return blocked.exact_pair_sum
    if implementation == "triton":
        from t5vae.objective import fused

        return fused.centred_pair_sum
    return blocked.pair_sum


def _sums_in_fp32(implementation: str, kernel: Kernel, dimensions: int) -> bool:
    if implementation == "triton":
        from t5vae.objective import fused

        return fused.default_precision(kernel, dimensions) == "fp32"
    return True
