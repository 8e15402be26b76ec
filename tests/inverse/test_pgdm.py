"""PGDM: exact for isotropic Gaussian data."""

import pytest
import torch

import scoresde as sd
from scoresde.inverse.linear import Linear
from scoresde.inverse.pgdm import PGDM

f64 = torch.float64


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


@pytest.mark.parametrize("std", [0.02, 0.5])
@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_exact_for_isotropic_gaussian_data(sde, std, scale):
    data = sd.GaussianMixture([1.0], draws(1, 5), [scale])
    a, y = Linear(draws(3, 5, seed=1)), draws(1, 3, seed=2)
    exact = data.posterior(a, y, std).score(sde)
    led = PGDM(data.score(sde), a, y, std, sigma_data=scale, strength=1.0)
    for t in (sde.t_min_sampling, 0.1, 0.5, sde.t_max):
        x = draws(4, 5, seed=3) * (sde.alpha(t) ** 2 + sde.sigma(t) ** 2).sqrt()
        torch.testing.assert_close(led.noise(x, t), exact.noise(x, t), rtol=1e-6, atol=1e-6)


def test_exact_without_noise():
    data = sd.GaussianMixture([1.0], draws(1, 5), [0.6])
    a, y = Linear(draws(3, 5, seed=1)), draws(1, 3, seed=2)
    exact = data.posterior(a, y, 1e-9).score(sd.VP())
    led = PGDM(data.score(sd.VP()), a, y, 0.0, sigma_data=0.6, strength=1.0)
    x = draws(4, 5, seed=3)
    torch.testing.assert_close(led.noise(x, 0.3), exact.noise(x, 0.3), rtol=1e-6, atol=1e-6)


def test_strength_and_the_spread_it_takes(mixture):
    """A strength is a variance divided; without a scale, 0.6 of what the model knows."""
    sde, a, y = sd.VP(), Linear(draws(2, 2, seed=1)), draws(1, 2, seed=2)
    x, t = draws(4, 2, seed=3), 0.4
    score = mixture.score(sde)
    q2 = float(sde.sigma(t) / sde.alpha(t)) ** 2
    # 1/v = 1/s^2 + 1/q^2: the scale whose variance is an eighth of that for 0.6.
    eighth = 0.36 * q2 / (0.36 + q2) / 8
    other = (1 / (1 / eighth - 1 / q2)) ** 0.5
    same = PGDM(score, a, y, 0.1, sigma_data=other, strength=1.0)
    torch.testing.assert_close(PGDM(score, a, y, 0.1)(x, t), same(x, t), rtol=1e-9, atol=1e-9)
    assert PGDM(score, a, y, 0.1).scale == pytest.approx(0.6)
    assert PGDM(score, a, y, 0.1, sigma_data=0.9).scale == 0.9


def test_held_where_data_spread_further():
    """Correlated data: along ``w`` the state never lands further beyond than it started."""
    factor = torch.tensor([[3.0, 2.9], [2.9, 3.0]], dtype=f64)
    data = sd.CorrelatedMixture([1.0], torch.zeros(1, 2).double(), (factor @ factor.T)[None])
    a, y = Linear([[0.5, 0.5]]), torch.tensor([[1.0]], dtype=f64)
    score, x = data.score(sd.VP()), draws(5, 2, seed=3)
    for t in (0.1, 0.5, 0.9):
        before, after = (y - a(s.denoise(x, t)) for s in (score, PGDM(score, a, y, 0.0)))
        torch.testing.assert_close(after, -before, rtol=1e-9, atol=1e-9)


def test_reach_bounds_the_pull_and_more_steps_bear_more(mixture):
    score, a, y = mixture.score(sd.VP()), Linear([[1.0, 0.0]]), draws(1, 1, seed=2)
    x = draws(4, 2, seed=3)
    r = y - a(score.denoise(x, 0.3))
    for reach in (1.0, 3.0):
        led = PGDM(score, a, y, 0.0, strength=1e6, reach=reach)
        torch.testing.assert_close(y - a(led.denoise(x, 0.3)), (1 - reach) * r)
    assert PGDM.suited(40) == {"reach": 5.0}
    with pytest.raises(ValueError, match="finite reach >= 1"):
        PGDM(score, a, y, 0.1, reach=0.0)


@pytest.mark.parametrize("strength", [0.0, -1.0, float("inf")])
def test_refuses_strength(mixture, strength):
    with pytest.raises(ValueError, match="strength"):
        PGDM(mixture.score(sd.VP()), Linear([[1.0, 0.0]]), draws(1, 1), 0.1, strength=strength)
