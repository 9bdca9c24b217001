"""The precision in which an objective's matrices are multiplied, whatever the model's are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def true_fp32() -> Iterator[None]:
    """Multiply fp32 matrices in fp32 on CUDA too, where a run lets its model's be in TF32.

    The squared distance of two codes is a small difference of large products, of which TF32's 11
    bits leave little. The setting is the process's own; what it was comes back afterwards.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
