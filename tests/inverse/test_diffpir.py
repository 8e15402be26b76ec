"""DiffPIR: the denoised data solve the proximal problem, without a derivative of the score."""

import pytest
import torch

import scoresde as sd
from scoresde.inverse.diffpir import DiffPIR
from scoresde.inverse.linear import Linear

f64 = torch.float64


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


@pytest.mark.parametrize("strength", [0.5, 7.0])
@pytest.mark.parametrize("std", [0.05, 0.5])
def test_minimises(sde, mixture, std, strength):
    score, a = mixture.score(sde), Linear(draws(3, 2, seed=1))
    y, x = draws(4, 3, seed=2), draws(4, 2, seed=3)
    led = DiffPIR(score, a, y, std, strength=strength)
    for t in (0.05, 0.5):
        rho2 = float((sde.sigma(t) / sde.alpha(t)) ** 2) / strength
        x0 = score.denoise(x, t)
        found = led.denoise(x, t).detach().requires_grad_()
        objective = (y - a(found)).square().sum() / (2 * std**2)
        objective = objective + (found - x0).square().sum() / (2 * rho2)
        (gradient,) = torch.autograd.grad(objective, found)
        size = a.adjoint(y - a(x0)).abs().max() / std**2
        assert gradient.abs().max() < 1e-9 * size


def test_without_noise_it_is_the_projection(mixture):
    score, a, y = mixture.score(sd.VP()), Linear([[1.0, 2.0]]), draws(4, 1)
    x = draws(4, 2, seed=3)
    led = DiffPIR(score, a, y, 0.0)
    x0 = score.denoise(x, 0.4)
    expected = x0 + a.pinv(y - a(x0))
    torch.testing.assert_close(led.denoise(x, 0.4), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("strength", [0.0, -1.0, float("inf")])
def test_refuses_strength(mixture, strength):
    with pytest.raises(ValueError, match="strength"):
        DiffPIR(mixture.score(sd.VP()), Linear([[1.0, 0.0]]), draws(1, 1), 0.1, strength=strength)
