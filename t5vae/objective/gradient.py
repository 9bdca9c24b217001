"""A value whose gradient is already known."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def with_gradient(z: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """`value` as a function of `z` with the given gradient, so that the backward pass only scales.

    Args:
        z: what the value is a function of, any shape.
        value: a scalar without gradient.
        gradient: of the shape of `z`; it reaches `z` in the dtype of `z`.
    """
    return _WithGradient.apply(z, value, gradient)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, value, gradient):
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None
