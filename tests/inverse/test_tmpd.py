"""TMPD: exact for Gaussian data of independent entries."""

import pytest
import torch

import scoresde as sd
from scoresde.inverse.linear import Linear
from scoresde.inverse.mask import Mask
from scoresde.inverse.tmpd import TMPD

f64 = torch.float64


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


@pytest.mark.parametrize("std", [0.02, 0.5])
@pytest.mark.parametrize("kind", ["mask", "matrix"])
def test_exact_for_independent_entries(sde, std, kind):
    data = sd.GaussianMixture([1.0], draws(1, 5), torch.linspace(0.2, 1.5, 5, dtype=f64)[None])
    a = Mask(torch.tensor([1, 0, 1, 1, 0])) if kind == "mask" else Linear(draws(3, 5, seed=1))
    y = a(draws(1, 5, seed=2))
    exact = data.posterior(a, y, std).score(sde)
    led = TMPD(data.score(sde), a, y, std)
    for t in (sde.t_min_sampling, 0.1, 0.5, sde.t_max):
        x = draws(4, 5, seed=3) * (sde.alpha(t) ** 2 + sde.sigma(t) ** 2).sqrt()
        scale = exact.noise(x, t).abs().max().clamp_min(1)
        assert (led.noise(x, t) - exact.noise(x, t)).abs().max() < 1e-6 * scale


def test_negative_row_sums_do_not_explode():
    """Two entries that lean against each other: each row of the covariance sums to about zero."""
    m = torch.tensor([[1.0, -1.05], [-1.0, 1.05]], dtype=f64)
    score = sd.GaussianMixture([1.0, 1.0], m, [0.05, 0.05]).score(sd.VP())
    a, y = Linear(torch.eye(2, dtype=f64)), torch.tensor([[0.9, -1.0]], dtype=f64)
    x = 0.1 * draws(50, 2)
    for std in (0.0, 0.02):
        assert TMPD(score, a, y, std).denoise(x, 0.7).abs().max() < 3


def test_a_negative_row_sum_still_pulls():
    """The measured entry leans against a larger one: its row of the covariance sums below zero."""
    m = torch.tensor([[1.0, -2.0], [-1.0, 2.0]], dtype=f64)
    score = sd.GaussianMixture([1.0, 1.0], m, [0.05, 0.05]).score(sd.VP())
    a, y, x = (
        Linear(torch.eye(2, dtype=f64)[:1]),
        torch.tensor([[0.9]], dtype=f64),
        0.1 * draws(9, 2),
    )
    with torch.no_grad():
        assert bool((score.denoised_covariance(x, 0.7).sum(2)[:, 0] < 0).all())
        before, after = score.denoise(x, 0.7), TMPD(score, a, y, 0.02).denoise(x, 0.7)
        assert bool(((after[:, 0] - 0.9).abs() < 0.2 * (before[:, 0] - 0.9).abs()).all())


def test_refuses_iterations(mixture):
    with pytest.raises(ValueError, match="iterations >= 1"):
        TMPD(mixture.score(sd.VP()), Linear(draws(1, 2)), draws(1, 1), 0.1, iterations=0)
