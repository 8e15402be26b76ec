"""Autoguidance: the extrapolation from a worse score, and what it costs."""

import pytest
import torch
from counted import Counted, f64, labelled, network, states, times

import scoresde as sd
from scoresde.guidance import Autoguidance, ClassifierFree


def pair(sde):
    """A mixture, and the same with everything broader."""
    good = sd.GaussianMixture(
        [1.0, 2.0], torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=f64), [0.3, 0.5]
    )
    bad = sd.GaussianMixture([1.0, 1.0], good.means, 2 * good.stds[:, 0])
    return good.score(sde), bad.score(sde)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0])
def test_denoised_data_are_extrapolated(sde, scale):
    good, bad = pair(sde)
    guided = Autoguidance(good, bad, scale)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=f64)
    for t in times(sde):
        at = x * torch.hypot(sde.alpha(t), sde.sigma(t))
        one, other = good.denoise(at, t), bad.denoise(at, t)
        wanted = other + scale * (one - other)
        torch.testing.assert_close(guided.denoise(at, t), wanted, rtol=1e-6, atol=1e-6)
        eps = bad.noise(at, t) + scale * (good.noise(at, t) - bad.noise(at, t))
        torch.testing.assert_close(guided.noise(at, t), eps, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(guided(at, t), -eps / sde.sigma(t), rtol=1e-9, atol=1e-9)


def test_evaluations_of_each():
    sde = sd.VP()
    good, bad = (Counted(score) for score in pair(sde))
    x = torch.ones(3, 2, dtype=f64)
    for scale, rows, t in ((2.0, (1, 1), 0.3), (1.0, (1, 0), 0.3), (0.0, (0, 1), 0.3),
                           (2.0, (1, 0), 0.01)):  # fmt: skip
        guided = Autoguidance(good, bad, scale, (0.1, 9.0))
        guided(x, t)
        assert (len(good.rows()), len(bad.rows())) == rows
        assert guided.cost(torch.tensor(t)) == (sum(rows), 0)
    assert torch.equal(Autoguidance(good, bad, 1.0)(x, 0.3), good(x, 0.3))


def test_both_are_given_the_conditions():
    mixture = labelled()
    sde = sd.VE()
    good, bad = Counted(mixture.score(sde)), Counted(mixture.score(sde))
    x, y = states(mixture, sde, 0.5)
    found = Autoguidance(good, bad, 3.0)(x, 0.5, y=y)
    torch.testing.assert_close(found, mixture.score(sde)(x, 0.5, y=y))
    assert all(torch.equal(s.calls[0][1]["y"], y) for s in (good, bad))


def test_samples_of_two_networks():
    good, bad = network(), network()
    with torch.no_grad():
        bad.net.outer.weight.mul_(0.5)
    good.train()
    bad.train()
    guided, y = Autoguidance(good, bad, 1.5, (0.2, 9.0)), torch.arange(4)
    sd.sample(guided, (4, 3), y=y, steps=2)
    good.net.rows.clear()
    bad.net.rows.clear()
    out = sd.sample(guided, (4, 3), y=y, solver="sde-dpmpp-2m", steps=9)
    assert out.converged
    assert out.cost == (len(good.net.rows) + len(bad.net.rows), 0)
    assert len(good.net.rows) == out.nfe == 10 > len(bad.net.rows) > 0
    assert good.net.modes == bad.net.modes == {False}
    assert good.training
    assert bad.training
    good.eval()
    bad.eval()
    free = ClassifierFree(guided, 2.0)  # guidance of what is guided
    assert free.cost(torch.tensor(0.4)) == (4, 0)
    eps = [guided.noise(out.x, 0.4, **cond) for cond in ({}, {"y": y})]
    torch.testing.assert_close(free.noise(out.x, 0.4, y=y), eps[0] + 2 * (eps[1] - eps[0]))


def test_a_density_is_that_of_the_guided_flow():
    sde = sd.VP()
    means = torch.tensor([[0.8], [-0.7]], dtype=f64)
    good = sd.GaussianMixture([1.0, 2.0], means, [0.3, 0.4]).score(sde)
    bad = sd.GaussianMixture([1.0, 2.0], means, [0.7, 0.6]).score(sde)
    grid = torch.linspace(-5, 5, 201, dtype=f64)[:, None]
    out = sd.log_prob(Autoguidance(good, bad, 1.6), grid, divergence="exact", rtol=1e-7, atol=1e-7)
    assert float(out.log_prob.exp().sum() * 0.05) == pytest.approx(1.0, abs=2e-3)


def test_refusals():
    good, bad = pair(sd.VP())
    with pytest.raises(sd.ConfigError, match="one process and one range: the bad score is of the"):
        Autoguidance(good, pair(sd.Cosine())[1])
    with pytest.raises(sd.ConfigError, match="bad score is of items of shape"):
        Autoguidance(good, network())
    with pytest.raises(sd.ConfigError, match="Autoguidance needs an interval"):
        Autoguidance(good, bad, 2.0, (3.0, 3.0))
