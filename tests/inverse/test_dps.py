"""DPS: the Gaussian rule is exact where it can be, the published one is that of the paper."""

import pytest
import torch

import scoresde as sd
from scoresde.inverse.dps import DPS
from scoresde.inverse.linear import Linear

f64 = torch.float64


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


@pytest.mark.parametrize("std", [0.05, 0.5])
@pytest.mark.parametrize("kind", ["one number", "isotropic"])
def test_exact_where_one_variance_is_enough(sde, std, kind):
    """One number of any Gaussian data, or isotropic ones seen by equal singular values."""
    rows = 1.7 * torch.linalg.qr(draws(4, 4, seed=1)).Q
    one = kind == "one number"
    stds = torch.linspace(0.2, 1.5, 4, dtype=f64)[None] if one else [0.8]
    a = Linear(rows[:1] if one else rows[:2])
    data, y = sd.GaussianMixture([1.0], draws(1, 4), stds), draws(1, *a.out, seed=2)
    exact = data.posterior(a, y, std).score(sde)
    led = DPS(data.score(sde), a, y, std, reach=1.0)
    for t in (sde.t_min_sampling, 0.1, 0.5, sde.t_max):
        x = draws(4, 4, seed=3) * (sde.alpha(t) ** 2 + sde.sigma(t) ** 2).sqrt()
        torch.testing.assert_close(led.noise(x, t), exact.noise(x, t), rtol=1e-6, atol=1e-6)


def test_never_goes_beyond_the_measurement():
    """Along the residual the pull ends at ``y`` without noise, and before it with noise."""
    data = sd.GaussianMixture([1.0], draws(1, 4), torch.linspace(0.2, 1.5, 4, dtype=f64)[None])
    a, y = Linear(draws(3, 4, seed=1)), draws(1, 3, seed=2)
    score, x = data.score(sd.VP()), draws(6, 4, seed=3)
    for t in (1e-3, 0.1, 0.9):
        r = y - a(score.denoise(x, t))
        along = [
            ((y - a(DPS(score, a, y, s, reach=1.0).denoise(x, t))) * r).sum(1) for s in (0.0, 0.3)
        ]
        assert bool((along[0].abs() < 1e-9 * (r * r).sum(1)).all())
        assert bool((along[1] > 0).all())
        assert bool((along[1] < (r * r).sum(1)).all())


@pytest.mark.parametrize("reach", [1.0, 2.0, 5.0])
def test_reach_is_how_far_beyond_the_measurement_it_may_land(reach):
    """Without noise the residual becomes ``(1 - reach)`` of itself, along itself."""
    data = sd.GaussianMixture([1.0], draws(1, 4), torch.linspace(0.2, 1.5, 4, dtype=f64)[None])
    a, y = Linear(draws(3, 4, seed=1)), draws(1, 3, seed=2)
    score, x = data.score(sd.VP()), draws(6, 4, seed=3)
    r = y - a(score.denoise(x, 0.3))
    after = y - a(DPS(score, a, y, 0.0, reach=reach).denoise(x, 0.3))
    torch.testing.assert_close((after * r).sum(1), (1 - reach) * (r * r).sum(1))


def test_with_all_reach_it_is_the_paper_s_gaussian(mixture):
    score, a, y = mixture.score(sd.VP()), Linear(draws(1, 2, seed=1)), draws(1, 1, seed=2)
    x, t, std = draws(3, 2, seed=3), torch.tensor(0.4, dtype=f64), 0.1
    led = DPS(score, a, y, std, reach=1e9)
    with torch.enable_grad():
        x.requires_grad_()
        square = (y - a(score.denoise(x, t))).square().sum() / (2 * std**2)
        (gradient,) = torch.autograd.grad(square, x)
    torch.testing.assert_close(led(x.detach(), t), (score(x, t) - gradient).detach())


def test_next_to_no_noise_is_none(mixture):
    single, a = mixture.to(dtype=torch.float32).score(sd.VP()), Linear(draws(1, 2, seed=1))
    y, x = draws(1, 1, seed=2), draws(3, 2, seed=3).float()
    found, exact = (DPS(single, a, y, std).denoise(x, 0.4) for std in (1e-25, 0.0))
    torch.testing.assert_close(found, exact)


def test_more_steps_bear_a_longer_reach():
    assert [DPS.suited(n)["reach"] for n in (1, 10, 40, 64, 1000)] == [2, 2, 5, 8, 8]


@pytest.mark.parametrize("reach", [0.5, float("inf"), float("nan")])
def test_refuses_reach(mixture, reach):
    with pytest.raises(ValueError, match="finite reach >= 1"):
        DPS(mixture.score(sd.VP()), Linear(draws(1, 2)), draws(1, 1), 0.1, reach=reach)


def test_published_rule(mixture):
    """An ancestral step of a thousand on VP moves by ``-zeta grad |r|``, up to the step's size."""
    sde, zeta = sd.VP(), 0.7
    score, a, y = mixture.score(sde), Linear(draws(1, 2, seed=1)), draws(1, 1, seed=2)
    led = DPS(score, a, y, 0.1, zeta=zeta)
    x = draws(3, 2, seed=3)
    for i in (200, 500, 900):
        t, s = (torch.tensor(v / 1000, dtype=f64) for v in (i, i - 1))
        step = sd.solvers.Ancestral().step
        noise = lambda: torch.Generator().manual_seed(0)  # noqa: E731
        moved = (
            step(sde.reverse(led), x, t, s, noise())[0]
            - step(sde.reverse(score), x, t, s, noise())[0]
        )
        gradient = torch.zeros_like(x)
        for j in range(2):
            e = 1e-6 * torch.eye(2, dtype=f64)[j]
            ahead, behind = ((y - a(score.denoise(v, t))).norm(dim=1) for v in (x + e, x - e))
            gradient[:, j] = (ahead - behind) / 2e-6
        torch.testing.assert_close(moved, -zeta * gradient, rtol=0.02, atol=1e-4)


def test_zeta_zero_is_the_score_alone(mixture):
    score = mixture.score(sd.VP())
    led = DPS(score, Linear(draws(1, 2)), draws(1, 1), 0.1, zeta=0.0)
    x = draws(3, 2)
    torch.testing.assert_close(led(x, 0.4), score(x, 0.4), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("zeta", [-1.0, float("inf"), float("nan")])
def test_refuses_zeta(mixture, zeta):
    with pytest.raises(ValueError, match="zeta"):
        DPS(mixture.score(sd.VP()), Linear(draws(1, 2)), draws(1, 1), 0.1, zeta=zeta)
