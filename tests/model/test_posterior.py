"""Codes that are drawn: a Gaussian posterior in any bottleneck."""

import pytest
import torch

from t5vae.common.kinds import BOTTLENECKS
from t5vae.model import T5VAE, Regularisers, T5VAEConfig, row_keys
from t5vae.model.posterior import Posterior
from tests.model.conftest import LATENT_SIZE


@pytest.fixture(scope="module", params=BOTTLENECKS)
def drawn(request, build) -> T5VAE:
    return build(bottleneck=request.param, posterior="gaussian")


def noise(rows: int, first: int = 0) -> Regularisers:
    return Regularisers(row_keys(1, 0, torch.arange(first, first + rows)))


def test_without_keys_the_code_is_the_mean(drawn, ids_BT):
    states_BTC, mask_BT = torch.randn(3, 5, 16).double(), torch.ones(3, 5).long()
    encoded = drawn.bottleneck.compress(states_BTC, mask_BT)
    assert encoded.shape == (3, 2 * LATENT_SIZE)
    z_BD, posterior = drawn.compress(states_BTC, mask_BT)
    assert torch.equal(z_BD, posterior.mean_BD.double())
    assert drawn(ids_BT, mode="encode").shape == (len(ids_BT), LATENT_SIZE)
    assert torch.equal(drawn(ids_BT, mode="encode"), drawn(ids_BT, mode="encode"))


def test_a_row_has_the_same_draw_in_any_batch_and_another_in_another_step(drawn, ids_BT):
    rows = len(ids_BT)
    whole = drawn(ids_BT, mode="score", regularisers=noise(rows))
    last = drawn(ids_BT[1:], mode="score", regularisers=noise(rows - 1, 1))
    torch.testing.assert_close(whole.latent[1:], last.latent)
    torch.testing.assert_close(whole.mean[1:], last.mean)
    step = Regularisers(row_keys(1, rows, torch.arange(rows)))
    assert not torch.isclose(drawn(ids_BT, mode="encode", regularisers=step), whole.latent).any()
    assert not torch.isclose(whole.mean.double(), whole.latent).any()


def test_latent_noise_is_added_to_the_draw_and_is_another(drawn, ids_BT):
    keys_B = noise(len(ids_BT)).keys_B
    seen = []
    hook = drawn.bottleneck.feed_forward.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    plain = drawn(ids_BT, mode="score", regularisers=Regularisers(keys_B))
    noised = drawn(ids_BT, mode="score", regularisers=Regularisers(keys_B, latent_noise=1.0))
    hook.remove()
    assert torch.equal(plain.latent, noised.latent)
    assert not torch.isclose(*seen).all()


def test_draws_have_the_posteriors_mean_and_variance_and_its_gradient():
    rows = 4000
    encoded = torch.tensor([[0.5, -2.0, 0.0, 1.0]]).double().expand(rows, -1).requires_grad_()
    posterior = Posterior.of(encoded)
    z_BD = posterior.draw(row_keys(0, 0, torch.arange(rows)))
    torch.testing.assert_close(z_BD.mean(0), torch.tensor([0.5, -2.0]), atol=0.1, rtol=0)
    torch.testing.assert_close(
        z_BD.var(0), torch.tensor([1.0, 1.0]).exp() ** torch.tensor([0, 1]), atol=0, rtol=0.1
    )
    (gradient,) = torch.autograd.grad(z_BD.sum(), encoded)
    half_noise = (z_BD - posterior.mean_BD).double() / 2
    torch.testing.assert_close(gradient, torch.cat([torch.ones(rows, 2), half_noise], 1).double())


def test_log_variances_that_would_overflow_are_bounded():
    posterior = Posterior.of(torch.tensor([[1.0, 1e30], [1.0, -1e30]]))
    assert posterior.log_variance_BD.flatten().tolist() == [20, -30]


def test_a_saved_model_is_loaded_with_its_posterior(drawn, ids_BT, tmp_path):
    drawn.save_pretrained(tmp_path)
    loaded = T5VAE.from_pretrained(tmp_path).double().eval()
    assert loaded.config.posterior == "gaussian"
    assert torch.equal(loaded(ids_BT, mode="encode"), drawn(ids_BT, mode="encode"))
    assert torch.equal(loaded.generate(ids_BT), drawn.generate(ids_BT))


@pytest.mark.parametrize("other", [{"normalize": True}, {"squash": "tanh"}])
def test_codes_that_are_changed_after_the_draw_are_refused(other):
    with pytest.raises(ValueError, match="goes with neither"):
        T5VAEConfig(posterior="gaussian", **other)
