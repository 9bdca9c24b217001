import math

import pytest
import torch
from torch import Generator

from t5vae.common.errors import UserError
from t5vae.common.kinds import PRIORS
from t5vae.latent.artifacts import write_tensors
from t5vae.latent.priors import FORMAT_VERSION, fit_prior, load_prior, save_prior
from t5vae.latent.priors.flow import Flow

MADE_FROM = {"model_sha256": "abc"}


def generator() -> Generator:
    return Generator().manual_seed(0)


def ring(n: int) -> torch.Tensor:
    """Codes on a noisy circle of radius 4 around (10, -3), which no normal distribution fits."""
    angles_N = 2 * math.pi * torch.rand(n, generator=generator())
    circle_N2 = 4 * torch.stack([angles_N.cos(), angles_N.sin()], 1)
    return circle_N2 + 0.3 * torch.randn(n, 2, generator=generator()) + torch.tensor([10.0, -3.0])


@pytest.fixture(scope="module", autouse=True)
def small_flow():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flow, "STEPS", 500)
        patch.setattr(Flow, "HIDDEN", (32, 32))
        yield


@pytest.fixture(scope="module", params=PRIORS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def prior(name, small_flow):
    """Each of them, fitted on a ring."""
    return fit_prior(name, ring(4000))


def test_draws_repeat_by_seed(prior):
    drawn_ND = prior.draw(5, generator())
    assert (drawn_ND.shape, drawn_ND.dtype) == ((5, 2), torch.float32)
    assert torch.equal(prior.draw(5, generator()), drawn_ND)
    assert not torch.equal(prior.draw(5, Generator().manual_seed(1)), drawn_ND)


def test_the_density_adds_up_to_one_and_is_that_of_the_draws(prior):
    grid_N2 = torch.cartesian_prod(torch.arange(-12, 28, 0.1), torch.arange(-20, 14, 0.1))
    share_N = prior.log_density(grid_N2).exp() * 0.1**2
    assert share_N.dtype == torch.float64
    assert share_N.sum().item() == pytest.approx(1, abs=0.01)
    drawn_N2 = prior.draw(20_000, generator())
    for column, edge in ((0, 10.5), (1, -1.0)):
        drawn = (drawn_N2[:, column] > edge).double().mean().item()
        assert share_N[grid_N2[:, column] > edge].sum().item() == pytest.approx(drawn, abs=0.02)


def test_a_kept_prior_draws_the_same(name, prior, tmp_path):
    path = tmp_path / "deep" / "prior.safetensors"
    assert load_prior(path, MADE_FROM, 2) is None
    save_prior(name, prior, path, MADE_FROM)
    kept = load_prior(path, MADE_FROM, 2)
    assert type(kept) is type(prior)
    assert torch.equal(kept.draw(9, generator()), prior.draw(9, generator()))
    assert torch.equal(kept.log_density(ring(9)), prior.log_density(ring(9)))
    assert load_prior(path, {"model_sha256": "abd"}, 2) is None
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_kept_prior_that_lacks_tensors_is_damaged(name, prior, tmp_path, monkeypatch):
    path = tmp_path / "prior.safetensors"
    tensors = prior.tensors()
    tensors.pop(next(reversed(tensors)))
    monkeypatch.setattr(prior, "tensors", lambda: tensors)
    save_prior(name, prior, path, MADE_FROM)
    with pytest.raises(UserError, match=r"prior.safetensors is damaged .*: remove it"):
        load_prior(path, MADE_FROM, 2)


CHANGES = {
    "of another dimension": lambda tensor: tensor[None],
    "twice": lambda tensor: torch.cat([tensor, tensor]),
    "nothing": lambda tensor: tensor[:0],
    "infinite": lambda tensor: tensor * math.inf,
}
PARTS = [
    *(("gaussian", part) for part in ("mean_D", "axes_DD", "scales_D")),
    *(("gmm", part) for part in ("axes_DD", "weights_K", "means_KD", "roots_KDD")),
]


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@pytest.mark.parametrize(("kind", "part"), PARTS)
def test_a_kept_prior_of_other_tensors_is_damaged(tmp_path, monkeypatch, kind, part, change):
    path, prior = tmp_path / "prior.safetensors", fit_prior(kind, ring(400))
    tensors = prior.tensors()
    monkeypatch.setattr(prior, "tensors", lambda: tensors | {part: change(tensors[part])})
    save_prior(kind, prior, path, MADE_FROM)
    with pytest.raises(UserError, match=r"prior.safetensors is damaged .*: remove it"):
        load_prior(path, MADE_FROM, 2)


@pytest.mark.parametrize("said", [7, None, [], {}, "../gaussian"])
def test_a_kept_prior_of_no_kind_is_damaged(tmp_path, said):
    path, tensors = tmp_path / "prior.safetensors", fit_prior("gaussian", ring(40)).tensors()
    write_tensors(path, tensors, {"prior": said}, FORMAT_VERSION, MADE_FROM)
    with pytest.raises(UserError, match=r"prior.safetensors is damaged .*: remove it"):
        load_prior(path, MADE_FROM, 2)


def test_a_kept_prior_of_another_latent_size_is_damaged(name, prior, tmp_path):
    path = tmp_path / "prior.safetensors"
    save_prior(name, prior, path, MADE_FROM)
    with pytest.raises(UserError, match=r"prior.safetensors is damaged .*: remove it"):
        load_prior(path, MADE_FROM, 3)


def test_mixture_and_flow_find_the_hole_that_a_gaussian_fills():
    centre_N2 = torch.tensor([10.0, -3.0])
    inside = {}
    for name in ("gaussian", "gmm", "flow"):
        drawn_N2 = fit_prior(name, ring(4000)).draw(4000, generator())
        inside[name] = ((drawn_N2 - centre_N2).norm(dim=1) < 2.5).double().mean().item()
    assert inside["gaussian"] > 0.25
    assert inside["gmm"] < 0.02
    assert inside["flow"] < 0.1


def test_gaussian_draws_have_the_mean_and_covariance_of_the_codes():
    mix_DD = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.5, 0.0], [0.0, 0.0, 0.0]])  # the third is dead
    codes_ND = torch.randn(500, 3, generator=generator()) @ mix_DD.T + 3
    drawn_ND = fit_prior("gaussian", codes_ND).draw(200_000, generator())
    torch.testing.assert_close(drawn_ND.mean(0), codes_ND.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(drawn_ND.T.cov(), codes_ND.T.cov(), atol=0.05, rtol=0)


def test_a_mixture_of_one_is_the_gaussian():
    codes_ND = torch.randn(30, 6, generator=generator()) * 3  # too few for two components
    one, two = (fit_prior(name, codes_ND).log_density(codes_ND) for name in ("gaussian", "gmm"))
    torch.testing.assert_close(one, two, atol=0.2, rtol=0)  # covariances over 29 and 30


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("shape", [(20, 32), (40, 1), (30, 2)])
def test_few_codes_wide_codes_and_those_of_one_number(name, shape, monkeypatch):
    monkeypatch.setattr(Flow, "STEPS", 100)
    codes_ND = torch.randn(shape, generator=generator()).bfloat16()
    prior = fit_prior(name, codes_ND)
    drawn_ND = prior.draw(7, generator())
    assert drawn_ND.shape == (7, shape[1])
    assert drawn_ND.isfinite().all()
    assert prior.log_density(drawn_ND).isfinite().all()


@pytest.mark.parametrize("name", ["gaussian", "gmm", "flow"])
def test_codes_that_are_all_the_same_are_drawn_again(name, monkeypatch):
    monkeypatch.setattr(Flow, "STEPS", 100)
    drawn_ND = fit_prior(name, torch.full((30, 3), 2.0)).draw(5, generator())
    torch.testing.assert_close(drawn_ND, torch.full((5, 3), 2.0), atol=0.1, rtol=0)


@pytest.mark.parametrize("name", ["gmm", "flow"])
def test_a_fit_repeats_and_leaves_the_global_generator_alone(name, monkeypatch):
    monkeypatch.setattr(Flow, "STEPS", 100)
    before = torch.get_rng_state()
    one, two = (fit_prior(name, ring(500), seed=3).draw(4, generator()) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(fit_prior(name, ring(500), seed=4).draw(4, generator()), one)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "codes_ND", "message"),
    [
        ("vampprior", torch.zeros(50, 4), "unknown prior 'vampprior'; choose one of normal, "),
        ("gaussian", torch.zeros(1, 4), "'gaussian' is fitted on codes; 1 given, at least 2"),
        ("gmm", torch.zeros(0, 4), "'gmm' is fitted on codes; 0 given, at least 2"),
        ("flow", torch.zeros(19, 4), "'flow' is fitted on codes; 19 given, at least 20"),
        ("gmm", torch.full((50, 4), math.nan), "'gmm' .* some given are not finite"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(name, codes_ND, message):
    with pytest.raises(UserError, match=message) as caught:
        fit_prior(name, codes_ND)
    assert "\n" not in str(caught.value)
