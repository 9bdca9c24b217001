"""Muon's update on a CPU, held against DeepSpeed's."""

import pytest
import torch
from deepspeed.runtime.zero.muon import muon_optimizer, original_muon

from t5vae.training.muon import muon_on_cpu, orthogonalized

theirs = original_muon.muon_update
SHAPES = [(12, 12), (8, 32), (32, 8), (8, 10), (1, 5), (5, 1)]


@pytest.fixture
def ours(monkeypatch):
    """Muon's update as DeepSpeed finds it, by the precision."""
    if not hasattr(original_muon, "ns_compute_dtype"):
        pytest.skip("this DeepSpeed, older than 0.19.8, iterates in bf16 alone")
    for module in (original_muon, muon_optimizer):
        monkeypatch.setattr(module, "muon_update", theirs)
    monkeypatch.setattr(original_muon, "ns_compute_dtype", lambda *_: torch.float32)

    def update(precision):
        muon_on_cpu(precision)
        assert original_muon.muon_update is muon_optimizer.muon_update is not theirs
        return original_muon.muon_update

    return update


def gradient(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), (None, 1e-5), ("bf16", 0.1)])
def test_updates_and_momentum_are_deepspeeds(ours, shape, precision, tolerance):
    update, moments = ours(precision), torch.zeros(2, *shape)
    for step in range(3):
        grad = gradient(shape) + step
        new = update(grad.clone(), moments[0], beta=0.9, ns_method="standard")
        old = theirs(grad.clone(), moments[1], beta=0.9, ns_method="standard")
        torch.testing.assert_close(new, old, rtol=0, atol=tolerance)
        torch.testing.assert_close(moments[0], moments[1])
        assert new.is_contiguous()


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape):
    values = torch.linalg.svdvals(orthogonalized(gradient(shape), torch.float32))
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("shape", [(32, 512), (128, 32), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_direction_grows_in_a_matrix_of_low_rank(dtype, shape, rank, noise):
    low = gradient((shape[0], rank)) @ gradient((rank, shape[1]))
    values = torch.linalg.svdvals(orthogonalized(low + noise * gradient(shape), dtype))
    assert values.max() < 1.3


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_the_momentum_alone(ours, fault):
    grad, momentum = gradient((4, 6)), torch.ones(4, 6)
    grad[1, 2] = fault
    update = ours("fp32")(grad, momentum)
    assert not update.isfinite().all()
    assert torch.equal(momentum, torch.ones(4, 6))


def test_no_gradient_has_no_update(ours):
    assert not ours("fp32")(torch.zeros(4, 6), torch.zeros(4, 6)).any()
