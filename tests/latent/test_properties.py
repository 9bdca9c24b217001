import math

import numpy as np
import pytest
import torch

from t5vae.common.errors import UserError
from t5vae.latent.artifacts import write_tensors
from t5vae.latent.properties import FORMAT_VERSION, fit_property, load_property, save_property

ABOUT = {"name": "p", "kind": "ridge", "r2": 0.5, "n": 10, "scale": 1.0}
BIAS = {"1.bias": torch.ones(1)}


def codes(n: int) -> torch.Tensor:
    scale_D = torch.tensor([1.0, 5.0, 0.2, 1.0])
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(0)) * scale_D + 3


def test_ridge_finds_a_linear_property():
    z_ND = codes(500)
    weight_D = torch.tensor([2.0, -1.0, 10.0, 0.0])
    values_N = z_ND @ weight_D + 7
    found = fit_property(z_ND, values_N, name="sum")
    assert (found.name, found.kind, found.n) == ("sum", "ridge", 500)
    assert found.r2 > 0.9999
    assert found.scale == pytest.approx(values_N.std(correction=0).item())
    fresh_ND = codes(600)[500:].requires_grad_()
    predicted_N = found.predict(fresh_ND)
    torch.testing.assert_close(predicted_N, fresh_ND @ weight_D + 7, atol=0.02, rtol=0)
    (slope_ND,) = torch.autograd.grad(predicted_N.sum(), fresh_ND)
    torch.testing.assert_close(slope_ND, weight_D.expand(100, 4), atol=0.01, rtol=0)


def test_mlp_finds_what_ridge_cannot():
    z_ND = codes(2000)
    values_N = 100 + 20 * (z_ND[:, 0] - 3).abs()
    assert fit_property(z_ND, values_N).r2 < 0.1
    found = fit_property(z_ND, values_N, kind="mlp")
    assert found.r2 > 0.9
    assert (found.predict(z_ND) - values_N).square().mean() < 0.1 * values_N.var()
    again = fit_property(z_ND, values_N, kind="mlp")
    assert torch.equal(again.predict(z_ND), found.predict(z_ND))


def test_r2_is_of_held_out_texts():
    noise_N = np.random.default_rng(0).normal(size=50)
    assert fit_property(torch.randn(50, 45), noise_N).r2 < 0.3


def test_values_that_are_not_finite_are_left_out():
    z_ND = codes(60)
    values_N = z_ND[:, 0].tolist()
    values_N[3], values_N[40] = math.nan, math.inf
    found = fit_property(z_ND, values_N)
    kept = [i for i in range(60) if i not in (3, 40)]
    assert found.n == 58
    same = fit_property(z_ND[kept], [values_N[i] for i in kept])
    assert torch.equal(found.predict(z_ND), same.predict(z_ND))


@pytest.mark.parametrize("kind", ["ridge", "mlp"])
def test_ten_texts_are_enough_and_wide_codes_are_taken_in_any_dtype(kind):
    z_ND = torch.randn(10, 32)
    found = fit_property(z_ND.bfloat16(), range(10), kind=kind)
    assert math.isfinite(found.r2)
    assert found.predict(z_ND.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("values_N", "kind", "message"),
    [
        ([1.0] * 20, "ridge", "'p' is 1 for all 20 texts"),
        ([math.nan] * 11 + list(range(9)), "ridge", "'p' is known of 9 texts; at least 10"),
        (range(19), "ridge", "'p' has 19 values for 20 codes"),
        (range(20), "forest", "unknown kind of property 'forest'; choose ridge or mlp"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(values_N, kind, message):
    with pytest.raises(UserError, match=message) as caught:
        fit_property(codes(20), values_N, name="p", kind=kind)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["ridge", "mlp"])
def test_a_property_is_kept_with_what_it_was_made_from(tmp_path, kind):
    z_ND = codes(100)
    made_from = {"model_sha256": "abc", "texts": 100}
    found = fit_property(z_ND, z_ND.norm(dim=1), name="norm", kind=kind)
    path = tmp_path / "norm.safetensors"
    assert load_property(path, made_from, 4) is None
    save_property(found, path, made_from)
    kept = load_property(path, made_from, 4)
    assert repr(kept) == repr(found)
    assert torch.equal(kept.predict(z_ND), found.predict(z_ND))
    assert load_property(path, {**made_from, "model_sha256": "abd"}, 4) is None


def test_a_kept_property_that_lacks_something_is_damaged(tmp_path):
    path = tmp_path / "p.safetensors"
    for tensors, about in (({}, {"name": "p"}), ({"1.weight": torch.ones(1, 4)} | BIAS, ABOUT)):
        write_tensors(path, tensors, about, FORMAT_VERSION, {})
        with pytest.raises(UserError, match=r"p.safetensors is damaged .*: remove it"):
            load_property(path, {}, 4)


LAYER = {"0.weight": torch.ones(1, 4), "0.bias": torch.ones(1)}
WRONG_LAYERS = {
    "of another latent size": {"0.weight": torch.ones(1, 5)},
    "of many numbers": {"0.weight": torch.ones(3, 4), "0.bias": torch.ones(3)},
    "of a bias of another size": {"0.bias": torch.ones(2)},
    "of a scalar": {"0.bias": torch.ones(())},
    "of integers": {"0.weight": torch.ones(1, 4, dtype=torch.int64)},
    "not finite": {"0.weight": torch.full((1, 4), torch.nan)},
}


@pytest.mark.parametrize("tensors", WRONG_LAYERS.values(), ids=list(WRONG_LAYERS))
def test_a_kept_property_of_other_layers_is_damaged(tmp_path, tensors):
    path = tmp_path / "p.safetensors"
    write_tensors(path, LAYER, ABOUT, FORMAT_VERSION, {})
    assert load_property(path, {}, 4).predict(codes(2)).shape == (2,)
    write_tensors(path, LAYER | tensors, ABOUT, FORMAT_VERSION, {})
    with pytest.raises(UserError, match=r"p.safetensors is damaged .*: remove it"):
        load_property(path, {}, 4)


@pytest.mark.parametrize("key", ABOUT)
@pytest.mark.parametrize("value", [None, [], {}, math.nan, "a\nb"])
def test_a_kept_property_that_says_something_else_is_damaged(tmp_path, key, value):
    path = tmp_path / "p.safetensors"
    write_tensors(path, LAYER, ABOUT | {key: value}, FORMAT_VERSION, {})
    with pytest.raises(UserError, match=r"p.safetensors is damaged .*: remove it"):
        load_property(path, {}, 4)
