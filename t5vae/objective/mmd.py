"""MMD^2 between the global batch of latent codes and the prior N(0, sigma^2 I).

Shapes: b codes of this rank, N codes of the global batch, D latent size.

The codes of all data-parallel ranks are gathered without gradient; each rank computes the exact
gradient of its own rows from its row block [b, N] already in the forward pass, so the backward
pass communicates nothing. W ranks with b codes each give what one process with W*b codes gives.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from t5vae.objective.kernels import make_kernel

ROWS = 512


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
) -> Tensor:
    """MMD^2 (Gretton et al., JMLR 13, 2012, eq. 3 and 5) of the global batch of codes.

    Args:
        z_BD: this rank's codes, floating, [b, D]; b may differ between ranks.
        kernel: "rbf", "multi_rbf", "imq" or "legacy" (see `make_kernel`).
        prior: "normal", its expectations in closed form, or "sampled", N draws of it.
        estimator: "u" (unbiased) or "v" (biased: its optimum shrinks the codes).
        sigma: the prior's standard deviation.
        weights_B: [b], 0 for rows that do not count; default all ones.
        group: the data-parallel ranks; default all, or this process alone where none is set up.
        gradient_scale: multiplies the gradient; default the number of ranks, which cancels the
            mean reduction of DeepSpeed and DDP.
        generator_seed: seeds the draws of prior "sampled"; must be the same on every rank.

    Returns:
        A float32 scalar, equal on every rank, with its gradient to `z_BD`; 0 where fewer than two
        rows of the global batch count.

    Raises:
        ValueError: for an unknown kernel, prior or estimator, or codes that are not [b, D].
    """
    pending = start_gather(z_BD, weights_B=weights_B, group=group)
    return pending.finish(
        kernel=kernel,
        prior=prior,
        estimator=estimator,
        sigma=sigma,
        gradient_scale=gradient_scale,
        generator_seed=generator_seed,
    )


def start_gather(
    z_BD: Tensor, *, weights_B: Tensor | None = None, group: dist.ProcessGroup | None = None
) -> "PendingMMD":
    """Start gathering the codes, so that they travel while the decoder runs; see `finish`."""
    if z_BD.ndim != 2 or z_BD.shape[1] == 0:
        raise ValueError(f"codes have shape {tuple(z_BD.shape)}; expected [rows, dimensions]")
    if weights_B is None:
        weights_B = torch.ones(z_BD.shape[0], device=z_BD.device)
    local = torch.cat([z_BD.detach().float(), weights_B.detach().float()[:, None]], dim=1)
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return PendingMMD(z_BD, weights_B, group, [local], 0, [])

    world = dist.get_world_size(group)
    count = torch.tensor([local.shape[0]], device=local.device)
    counts = [torch.empty_like(count) for _ in range(world)]
    dist.all_gather(counts, count, group=group)
    most = int(max(counts))
    padded = torch.nn.functional.pad(local, (0, 0, 0, most - local.shape[0]))
    gathered = [torch.empty_like(padded) for _ in range(world)]
    work = dist.all_gather(gathered, padded, group=group, async_op=True)
    return PendingMMD(z_BD, weights_B, group, gathered, dist.get_rank(group) * most, [work])


@dataclass
class PendingMMD:
    """A gather under way. `offset` is where this rank's rows begin among the gathered ones."""

    z_BD: Tensor
    weights_B: Tensor
    group: dist.ProcessGroup | None
    gathered: list[Tensor]
    offset: int
    works: list

    def finish(
        self,
        *,
        kernel: str = "multi_rbf",
        prior: str = "normal",
        estimator: str = "u",
        sigma: float = 1.0,
        gradient_scale: float | None = None,
        generator_seed: int = 0,
    ) -> Tensor:
        """Wait for the codes and compute the statistic; arguments and result as in `mmd`."""
        if prior not in ("normal", "sampled"):
            raise ValueError(f"prior is {prior!r}; choose normal or sampled")
        if estimator not in ("u", "v"):
            raise ValueError(f"estimator is {estimator!r}; choose u or v")
        dimensions = self.z_BD.shape[1]
        phi = make_kernel(kernel, dimensions, sigma)
        for work in self.works:
            work.wait()
        everyone = torch.cat(self.gathered)
        codes_ND, weights_N = everyone[:, :-1], everyone[:, -1]
        count = float(weights_N.sum())
        if count < 2:
            return self.z_BD.float().sum() * 0.0
        unbiased = estimator == "u"
        pairs = count * (count - 1) if unbiased else count**2

        with torch.autocast(self.z_BD.device.type, enabled=False):
            z_BD, weights_B = self.z_BD.float(), self.weights_B.float()
            own = self.offset if unbiased else None
            within = _PairSum.apply(z_BD, weights_B, codes_ND, weights_N, phi, own, 4) / pairs
            if prior == "normal":
                cross_B = phi.prior_cross(z_BD.square().sum(1), dimensions, sigma)
                cross = (weights_B * cross_B).sum(dtype=torch.float64) / count
                constant = phi.prior_self(dimensions, sigma)
            else:
                draws = _draws(int(count), dimensions, sigma, generator_seed, z_BD.device)
                ones = torch.ones_like(draws[:, 0])
                cross = _PairSum.apply(z_BD, weights_B, draws, ones, phi, None, 2) / count**2
                skip = 0 if unbiased else None
                constant = _PairSum.apply(draws, ones, draws, ones, phi, skip, 4) / pairs
            local = within - 2 * cross

        value = local.detach().clone()
        if self.works:
            dist.all_reduce(value, group=self.group)
        if gradient_scale is None:
            gradient_scale = len(self.gathered)
        # The value is the global one, the gradient that of this rank's own rows.
        return (value + constant + gradient_scale * (local - local.detach())).float()


class _PairSum(torch.autograd.Function):
    """sum_ij w_i v_j phi(|x_i - y_j|^2) in fp64, by chunks of rows: memory O(chunk N + N D).

    Args of `apply`: x [b, D] with weights w [b]; constants y [N, D] with weights v [N]; the
    kernel; `own`, the column of row 0 among the y, to leave out i = j, or None; `factor` of the
    gradient factor * w_i [(P y)_i - rowsum(P)_i x_i]: 2, or 4 where the y are the global batch,
    since each pair then stands twice in the global sum.
    """

    @staticmethod
    def forward(ctx, x_BD, w_B, y_ND, v_N, phi, own, factor):
        total = torch.zeros((), dtype=torch.float64, device=x_BD.device)
        grad_BD = torch.empty_like(x_BD)
        # Distances do not change under a shift, and lose fewer digits near the origin.
        mean_D = (v_N @ y_ND) / v_N.sum().clamp_min(1)
        y_ND = y_ND - mean_D
        y_squared_N = y_ND.square().sum(1)
        for start in range(0, x_BD.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            x_bD = x_BD[rows] - mean_D
            s_bN = torch.addmm(y_squared_N, x_bD, y_ND.T, alpha=-2)
            s_bN = (s_bN + x_bD.square().sum(1, keepdim=True)).clamp_min_(0)
            value_bN, slope_bN = phi.pair(s_bN)
            weight_bN = w_B[rows, None] * v_N
            if own is not None:
                weight_bN.diagonal(own + start).zero_()
            total += (value_bN * weight_bN).sum(dtype=torch.float64)
            slope_bN *= weight_bN
            grad_BD[rows] = factor * (slope_bN @ y_ND - slope_bN.sum(1, keepdim=True) * x_bD)
        ctx.save_for_backward(grad_BD)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (grad_BD,) = ctx.saved_tensors
        return grad.to(grad_BD.dtype) * grad_BD, *(None,) * 6


def _draws(count: int, dimensions: int, sigma: float, seed: int, device) -> Tensor:
    """Draws of the prior, [count, D], the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return (sigma * torch.randn(count, dimensions, generator=generator)).to(device)
