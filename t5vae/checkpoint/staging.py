"""Host memory that a rank's state is copied into, to be written while training goes on."""

import torch
from torch import Tensor

BUFFER = 2**28
"""Bytes of a buffer: torch rounds page-locked ones up to a power of two."""


class Staging:
    """Copies of a rank's state, whose memory is kept from one save to the next.

    It takes the bytes of the state, in buffers of one dtype each, page-locked for tensors of CUDA
    devices, so that these are copied one after the other without a wait in between.
    """

    def __init__(self) -> None:
        self.copies: dict[str, Tensor] = {}

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy a state to host memory; nobody may still read the one before.

        Args:
            tensors: 1-D, of any dtypes, on any device, by name.

        Returns:
            The same on the CPU: views, which the next call fills again.
        """
        if _layout(tensors) != _layout(self.copies):
            self.copies = {}  # so that there are never two
            self.copies = _empty_like(tensors)
        for name, tensor in tensors.items():
            self.copies[name].copy_(tensor, non_blocking=True)
        if any(tensor.device.type != "cpu" for tensor in tensors.values()):
            torch.accelerator.synchronize()
        return self.copies


def _layout(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, int]]:
    return {name: (tensor.dtype, tensor.numel()) for name, tensor in tensors.items()}


def _empty_like(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views of buffers; one that is larger than a buffer has its own."""
    copies = {}
    for dtype, pinned in {(tensor.dtype, tensor.is_cuda) for tensor in tensors.values()}:
        lengths = {
            name: tensor.numel()
            for name, tensor in tensors.items()
            if (tensor.dtype, tensor.is_cuda) == (dtype, pinned)
        }
        left, free = sum(lengths.values()), torch.empty(0, dtype=dtype)
        for name, length in lengths.items():
            if length > free.numel():
                size = max(length, min(left, BUFFER // dtype.itemsize))
                free = torch.empty(size, dtype=dtype, pin_memory=pinned)
            copies[name], free = free[:length], free[length:]
            left -= length
    return copies
