"""Liger's fused cross-entropy, which leaves what a model computes alone.

Triton's interpreter has to be chosen before the kernels are imported: its cases run in a process
of their own, which is this file run as a script.
"""

import json
import os
import subprocess
import sys
from functools import cache
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from t5vae.model import T5VAE, T5VAEConfig

T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4, "dropout_rate": 0.0}
T5 |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
PADDED = [9, 1, 4, 7, 2, 9]
LONGEST = 34


def make_model(tied: bool = True, layers: int = 1, vocabulary: int = 50, **t5) -> T5VAE:
    torch.manual_seed(0)
    t5 = {**T5, "num_layers": layers, "vocab_size": vocabulary, **t5}
    sizes = {"latent_size": 6, "sequence_length": LONGEST, "memory_length": 3}
    return T5VAE(T5VAEConfig(t5=t5, tie_word_embeddings=tied, **sizes)).train()


def sequences(lengths: list[int], vocabulary: int = 50) -> Tensor:
    """Random ones, each with its end token, padded to the longest."""
    generator = torch.Generator().manual_seed(sum(lengths))
    place, lengths_B = torch.arange(max(lengths)), torch.tensor(lengths)[:, None]
    ids_BT = torch.randint(2, vocabulary, (len(lengths), max(lengths)), generator=generator)
    ids_BT[place == lengths_B - 1] = 1
    return ids_BT.masked_fill(place >= lengths_B, 0)


def score(model: T5VAE, ids_BT: Tensor, labels_BT: Tensor | None = None) -> tuple[float, dict]:
    """The loss, and the gradient of every parameter."""
    model.zero_grad()
    output = model(ids_BT, labels=labels_BT, mode="score")
    output.loss.backward()
    gradients = {name: parameter.grad.float() for name, parameter in model.named_parameters()}
    assert (output.nll is None) == model.fused_cross_entropy
    return output.loss.item(), gradients


def worst(gradients: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest error of a gradient as a share of its norm."""
    assert gradients.keys() == right.keys()
    return max(
        ((gradients[name] - right[name]).norm() / (right[name].norm() + 1e-20)).item()
        for name in right
    )


LABELS = {
    "padded with 0": {},
    "padded with -100": {"ignored": True},
    "a row left out": {"ignored": True, "left_out": [3]},
    "one row": {"left_out": [0, 1, 3, 4, 5]},
    "no token": {"left_out": [0, 1, 2, 3, 4, 5]},
}


class Case(NamedTuple):
    labels: str
    tied: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        tied = "tied" if self.tied else "untied"
        return f"{self.labels}-{tied}-{self.dtype}".replace(" ", "_").replace("torch.", "")


class Found(NamedTuple):
    loss: float
    fused_loss: float
    gradient: float
    """`worst` of the fused ones."""


CASES = [Case(*rest) for rest in product(LABELS, [True, False], [torch.float32, torch.bfloat16])]


def fused_and_plain(
    model: T5VAE, ids_BT: Tensor, ignored: bool = False, left_out: list[int] | None = None
) -> Found:
    labels_BT = ids_BT.masked_fill(ids_BT == 0, -100) if ignored else ids_BT.clone()
    labels_BT[left_out or []] = -100
    loss, right = score(model, ids_BT, labels_BT)
    model.fused_cross_entropy = True
    fused_loss, gradients = score(model, ids_BT, labels_BT)
    return Found(loss, fused_loss, worst(gradients, right))


def check(found: Found, dtype: torch.dtype) -> None:
    assert found.fused_loss == pytest.approx(found.loss, rel=1e-5)
    assert found.gradient <= (1e-5 if dtype == torch.float32 else 5e-2)


@cache
def interpreted() -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_cross_entropy_gives_the_loss_and_gradients_of_the_plain_one(case):
    pytest.importorskip("liger_kernel", reason="Triton has no build for this platform")
    done = interpreted()
    assert done.returncode == 0, done.stderr[-3000:]
    found = Found(*json.loads(done.stdout)[str(case)])
    check(found, case.dtype)
    assert (found.loss == 0) == (case.labels == "no token")


def test_without_gradients_the_cross_entropy_of_each_row_is_known(monkeypatch):
    model, ids_BT = make_model(), sequences(PADDED)
    right_B = model(ids_BT, mode="score").nll
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # not to be asked
    model.fused_cross_entropy = True
    with torch.no_grad():
        torch.testing.assert_close(model(ids_BT, mode="score").nll, right_B)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_cuda_the_fused_cross_entropy_is_the_plain_one_in_less_memory(tied, dtype):
    pytest.importorskip("liger_kernel")
    wide = {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_heads": 8}
    vocabulary = 40_000  # more than liger takes at once
    model = make_model(tied, vocabulary=vocabulary, **wide).to("cuda", dtype)
    ids_BT = sequences([LONGEST, 5, 17, 30] * 64, vocabulary).cuda()
    check(fused_and_plain(model, ids_BT, ignored=True), dtype)

    peaks = []
    for fused in (False, True):
        model.fused_cross_entropy = fused
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        model(ids_BT, mode="score").loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0] / 2


def test_scoring_fills_no_cache(monkeypatch):
    # It would copy keys and values, and give each layer of the decoder a graph of its own.
    monkeypatch.setattr(DynamicCache, "update", lambda *_: pytest.fail("filled"))
    make_model()(sequences(PADDED), mode="score")


if __name__ == "__main__":
    results = {}
    for case in CASES:
        model = make_model(case.tied).to(case.dtype)
        results[str(case)] = fused_and_plain(model, sequences(PADDED), **LABELS[case.labels])
    print(json.dumps(results))
