"""MMPS: exact for Gaussian data, whatever the operator; robust where it cannot be."""

import pytest
import torch

import scoresde as sd
from scoresde.inverse.conjugate import solved
from scoresde.inverse.linear import Linear
from scoresde.inverse.mmps import MMPS

f64 = torch.float64


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def gaussian(dims=5):
    stds = torch.linspace(0.2, 1.5, dims, dtype=f64)[None]
    return sd.GaussianMixture([1.0], draws(1, dims), stds)


@pytest.mark.parametrize("std", [0.05, 0.5])
@pytest.mark.parametrize("sigma_data", [None, 0.4])
def test_exact_for_gaussian_data(sde, std, sigma_data):
    data, a, y = gaussian(), Linear(draws(3, 5, seed=1)), draws(1, 3, seed=2)
    exact = data.posterior(a, y, std).score(sde)
    led = MMPS(data.score(sde), a, y, std, sigma_data=sigma_data, iterations=3)
    for t in (sde.t_min_sampling, 0.1, 0.5, sde.t_max):
        x = draws(4, 5, seed=3) * (sde.alpha(t) ** 2 + sde.sigma(t) ** 2).sqrt()
        scale = exact.noise(x, t).abs().max()
        error = (led.noise(x, t) - exact.noise(x, t)).abs().max()
        assert error < 1e-6 * scale.clamp_min(1)


def test_exact_without_noise():
    sde, data = sd.VP(), gaussian()
    a, y = Linear(draws(2, 5, seed=1)), draws(1, 2, seed=2)
    exact = data.posterior(a, y, 1e-9).score(sde)
    led = MMPS(data.score(sde), a, y, 0.0, iterations=2)
    for t in (1e-3, 0.1, 0.7):
        x = draws(4, 5, seed=3)
        torch.testing.assert_close(led.noise(x, t), exact.noise(x, t), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(a(led.denoise(x, t)), y.expand(4, 2), rtol=1e-6, atol=1e-6)


def test_fewer_iterations_where_eigenvalues_repeat(sde):
    """Isotropic data, the scale known: one iteration is exact for any number of measurements."""
    data = sd.GaussianMixture([1.0], draws(1, 6), [0.7])
    a, y = Linear(draws(4, 6, seed=1)), draws(1, 4, seed=2)
    exact = data.posterior(a, y, 0.1).score(sde)
    led = MMPS(data.score(sde), a, y, 0.1, sigma_data=0.7, iterations=1)
    x = draws(4, 6, seed=3)
    torch.testing.assert_close(led(x, 0.4), exact(x, 0.4), rtol=1e-6, atol=1e-6)
    other = MMPS(data.score(sde), a, y, 0.1, sigma_data=0.2, iterations=1)
    assert (other(x, 0.4) - exact(x, 0.4)).abs().max() > 1e-4


def test_more_iterations_than_needed_change_nothing():
    sde, data = sd.VP(), gaussian()
    a, y = Linear(draws(2, 5, seed=1)), draws(1, 2, seed=2)
    x = draws(4, 5, seed=3)
    few, many = (MMPS(data.score(sde), a, y, 0.1, iterations=n)(x, 0.3) for n in (2, 30))
    torch.testing.assert_close(many, few, rtol=1e-9, atol=1e-9)


def test_log_density_is_that_of_the_exact_posterior():
    data = gaussian(3)
    sde = sd.VP(beta_max=40.0)  # whose end is the prior to many digits
    a, y = Linear(draws(2, 3, seed=1)), draws(1, 2, seed=2)
    posterior = data.posterior(a, y, 0.5)
    led = MMPS(data.score(sde), a, y, 0.5, iterations=2)
    x = posterior.sample(4, generator=torch.Generator().manual_seed(0))
    found = sd.log_prob(led, x, divergence="exact", rtol=1e-6, atol=1e-6)
    again = sd.log_prob(posterior.score(sde), x, divergence="exact", rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.log_prob, again.log_prob, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.log_prob, posterior.log_prob(x), rtol=0, atol=5e-3)


def test_a_covariance_that_is_none_is_not_followed():
    """Negative curvature stops a sample, and leaves its neighbours alone."""
    a = Linear(torch.eye(3, dtype=f64))
    signs = torch.tensor([[1.0], [-1.0]], dtype=f64) * torch.tensor([0.5, 1.0, 2.0], dtype=f64)
    r = draws(2, 3)
    w, change = solved(a, lambda v: signs * v, r, 0.01, torch.tensor(1.0), 3)
    assert not change[1].any()
    assert not w[1].any()
    torch.testing.assert_close(w[0], r[0] / (0.01 + signs[0]), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(change[0], signs[0] * w[0], rtol=1e-12, atol=1e-12)


def test_bounded_where_the_covariance_is_not_symmetric():
    a = Linear(torch.eye(4, dtype=f64))
    skew = torch.eye(4, dtype=f64) + 0.5 * torch.triu(torch.ones(4, 4, dtype=f64), 1)
    r = draws(8, 4)
    for n in (1, 2, 3, 5, 20):
        _, change = solved(a, lambda v: v @ skew, r, 0.01, torch.tensor(1.0), n)
        assert change.norm() < 10 * r.norm()


def test_refuses_iterations():
    with pytest.raises(ValueError, match="iterations >= 1"):
        MMPS(gaussian().score(sd.VP()), Linear(draws(2, 5)), draws(1, 2), 0.1, iterations=0)
