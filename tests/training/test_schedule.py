"""Schedules made of cells: exact densities, and the gradient that lowers the variance."""

import pytest
import torch
from torch import nn

import scoresde as sd
from scoresde import config
from scoresde.training import distributions, objectives, weights
from scoresde.training.schedule import Learned, VelocityImportance
from scoresde.training.step_noise import StepNoise

f64 = torch.float64


def fine(n=40_001):
    """Midpoints of equal cells of [0, 1]."""
    return (torch.arange(n, dtype=f64) + 0.5) / n


def shaped(cells=8, seed=0, scale=1.0):
    times = Learned(cells=cells)
    with torch.no_grad():
        source = torch.Generator().manual_seed(seed)
        times.module.logits.copy_(scale * torch.randn(cells, generator=source))
    return times


def pair(times, sde, u):
    """Times and corrections at given uniform numbers, with plain gradients."""
    if isinstance(times, Learned):
        return times.module(sde, u)
    t = times.quantile(sde, u)
    return t, times.correction(sde, t)


@pytest.mark.parametrize("times", [VelocityImportance(), shaped()], ids=["velocity", "learned"])
def test_corrections_are_exact_densities(sde, times):
    """The density of t is du/dt of what is drawn, within a cell of the schedule."""
    u, h = torch.rand(50, dtype=f64, generator=torch.Generator().manual_seed(0)), 1e-8
    with torch.no_grad():
        t, correction = pair(times, sde, u)
        slope = (pair(times, sde, u + h)[0] - pair(times, sde, u - h)[0]) / (2 * h)
    assert t.min() >= sde.t_min * (1 - 1e-9)
    assert t.max() <= sde.t_max * (1 + 1e-9)
    torch.testing.assert_close(correction * (sde.t_max - sde.t_min), slope, rtol=1e-5, atol=0)
    ends = torch.tensor([1e-12, 1 - 1e-12], dtype=f64)
    reached = sde.log_snr(pair(times, sde, ends)[0].detach())
    expected = torch.stack([sde.log_snr(sde.t_min), sde.log_snr(sde.t_max)])
    torch.testing.assert_close(reached, expected, rtol=1e-6, atol=1e-5)


def test_any_schedule_leaves_the_mean(sde):
    """Bumps all over the interval have the mean of uniform times."""
    u = fine()
    with torch.no_grad():
        t, correction = shaped().module(sde, u)
    low, high = sde.log_snr(sde.t_max), sde.log_snr(sde.t_min)
    for centre in (0.2, 0.5, 0.8):

        def bump(log_snr, centre=centre):
            return torch.exp(-8 * ((log_snr - low) / (high - low) - centre) ** 2)

        # The mean over uniform times, as an integral over log-SNR of the bump times |dt/dlog_snr|.
        log_snr = low + (high - low) * u
        at = sde.time(log_snr)
        rate = (sde.diffusion(at) / sde.sigma(at)) ** 2 / 2
        expected = (bump(log_snr) / rate).mean() * (high - low) / (sde.t_max - sde.t_min)
        value = (correction * bump(sde.log_snr(t))).mean()
        assert float(value) == pytest.approx(float(expected), rel=2e-4)


def test_velocity_importance_is_the_closed_form_of_i_dode():
    """VP: gamma = log(1/(e^{-Zu} (1 + e^{-g0}) - 1)), Z = log((1 + e^{-g0})/(1 + e^{-g1}))."""
    sde, u = sd.VP(), torch.linspace(0.01, 0.99, 25, dtype=f64)
    times = config.build("velocity-importance", distributions, "times")
    g0, g1 = (-2 * sde.log_snr(t) for t in (sde.t_min, sde.t_max))
    z = torch.log((1 + torch.exp(-g0)) / (1 + torch.exp(-g1)))
    expected = torch.log(1 / (torch.exp(-z * u) * (1 + torch.exp(-g0)) - 1))
    t = times.quantile(sde, u)
    torch.testing.assert_close(-2 * sde.log_snr(t), expected, rtol=0, atol=2e-5)
    # The weight on the error of v is then constant: Z in i-DODE's scale, where that of eps is 1/2.
    alpha = sde.alpha(t)
    factor = weights.Likelihood()(sde, t) * times.correction(sde, t) * alpha**2
    # Within a cell, alpha^2 turns by up to a factor e^(2 h), half of it either way of its middle.
    h = float(g1 - g0) / 2 / 4096
    torch.testing.assert_close(
        factor, z.expand(25) / (sde.t_max - sde.t_min), rtol=1.01 * h, atol=0
    )


def test_velocity_importance_on_the_straight_path():
    """Its density in sigma is that of i-DODE's integral, (1 - sigma)/sigma."""
    sde, u = sd.Linear(), torch.linspace(0.01, 0.99, 25, dtype=f64)
    t = VelocityImportance().quantile(sde, u)

    def cumulative(t):
        return t.log() - t

    low, high = (cumulative(torch.tensor(t, dtype=f64)) for t in (sde.t_min, sde.t_max))
    torch.testing.assert_close((cumulative(t) - low) / (high - low), u, rtol=0, atol=1e-5)


def test_a_new_schedule_is_importance_sampling(sde):
    u = fine(101)
    t, correction = Learned().module(sde, u)
    importance = distributions.Importance()
    torch.testing.assert_close(t.detach(), importance.quantile(sde, u), rtol=1e-6, atol=0)
    expected = importance.correction(sde, t.detach())
    torch.testing.assert_close(correction.detach(), expected, rtol=1e-6, atol=0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2).double()

    def forward(self, x, c_noise):
        return torch.sin(self.layer(x) + c_noise[:, None])


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_gradient_is_that_of_the_mean_square(sde, scale):
    """Through the one backward pass of a mean loss, network and all; a scaled loss is the same."""
    times = shaped(cells=5)
    objective = objectives.DSM("likelihood", times)
    model = sd.ScoreModel(Net(), sde, sd.V())
    x0 = torch.randn(16, 2, dtype=f64, generator=torch.Generator().manual_seed(1))
    noise = StepNoise(0, 0, 0, 16)
    t, correction = objective.times(sde, 16, noise)
    losses = correction * objective(model, x0, t=t, generator=noise)
    (scale * losses.mean() / 2).backward()
    got = times.module.logits.grad.clone()
    net_grad = model.net.layer.weight.grad / scale

    u = times.uniforms(16, StepNoise(0, 0, 0, 16))
    noise = StepNoise(0, 0, 0, 16)
    noise.draw = 1
    t, correction = times.module(sde, u)
    plain = correction * sd.DSM("likelihood")(model, x0, t=t, generator=noise)
    torch.testing.assert_close(plain, losses)
    objective_ = plain.square().mean() / plain.detach().mean() ** 2
    (expected,) = torch.autograd.grad(objective_, times.module.logits, retain_graph=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert float(expected.abs().max()) > 1e-3
    # The network's own gradient is left alone.
    (expected,) = torch.autograd.grad(plain.mean() / 2, model.net.layer.weight)
    torch.testing.assert_close(net_grad, expected)


def test_the_path_of_times_is_differentiated(sde):
    """d t/d logits, also where ``sde.time`` has no derivative, by finite differences."""
    times = shaped(cells=4)
    times.module.double()
    u = torch.tensor([0.05, 0.33, 0.61, 0.93], dtype=f64)
    logits = times.module.logits
    t, correction = times.module(sde, u)
    for value, column in ((t, 0), (correction, 1)):
        (got,) = torch.autograd.grad((value / value.detach()).sum(), logits, retain_graph=True)
        for k in range(4):
            sides = []
            for h in (1e-5, -1e-5):
                with torch.no_grad():
                    logits[k] += h
                    sides.append(times.module(sde, u)[column])
                    logits[k] -= h
            slope = ((sides[0] - sides[1]) / 2e-5 / value.detach()).sum()
            assert float(got[k]) == pytest.approx(float(slope), rel=1e-4, abs=1e-7)


def test_training_lowers_the_variance_and_leaves_the_mean():
    """A loss that is a known function of t: the best density is proportional to it."""
    sde = sd.VP()
    times = Learned()
    module = times.module
    low, high = sde.log_snr(sde.t_max), sde.log_snr(sde.t_min)
    weight = weights.Likelihood()

    def loss(t):
        share = (sde.log_snr(t) - low) / (high - low)
        return weight(sde, t) * (0.1 + torch.exp(-40 * (share - 0.4) ** 2))

    def moments():
        with torch.no_grad():
            t, correction = module(sde, fine())
            values = correction * loss(t)
        return float(values.mean()), float(values.var())

    mean, variance = moments()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for step in range(400):
        t, correction = times(sde, 128, StepNoise(0, step, 0, 128))
        optimizer.zero_grad()
        (correction * loss(t)).mean().backward()
        optimizer.step()
    after, left = moments()
    assert after == pytest.approx(mean, rel=1e-3)
    assert left < variance / 40
    # Where the loss is larger, the schedule is slower: the bump has its share of the times.
    t = times.quantile(sde, fine())
    share = (sde.log_snr(t) - low) / (high - low)
    at_bump = float(((share - 0.4).abs() < 0.1).double().mean())
    s = fine()
    profile = 0.1 + torch.exp(-40 * (s - 0.4) ** 2)
    best = float(profile[(s - 0.4).abs() < 0.1].sum() / profile.sum())
    assert at_bump == pytest.approx(best, abs=0.03)


def test_it_trains_beside_a_network_on_a_mixture(mixture):
    """With a score that errs, the empirical variance falls and the mean stays."""
    sde = sd.VP()

    class Wrong(sd.Score):
        def __init__(self):
            self.sde, self.exact = sde, mixture.score(sde)

        def __call__(self, x, t):
            return 1.3 * self.exact(x, t)

    objective = objectives.DSM("likelihood", {"name": "learned", "cells": 16})
    assert objective.module is objective.times.module
    x0 = mixture.sample(4096, torch.Generator().manual_seed(0))

    def figures():
        with torch.no_grad():
            losses = objective(Wrong(), x0, generator=StepNoise(9, 0, 0, 4096))
        return float(losses.mean()), float(losses.var()), float(losses.std()) / 64

    mean, variance, error = figures()
    optimizer = torch.optim.Adam(objective.module.parameters(), lr=0.05)
    for step in range(150):
        optimizer.zero_grad()
        noise = StepNoise(1, step, 0, 256)
        objective(Wrong(), x0[:256], generator=noise).mean().backward()
        optimizer.step()
    after, left, _ = figures()
    assert left < 0.75 * variance
    assert abs(after - mean) < 4 * error


def test_its_state_is_saved():
    times, again = shaped(), Learned(cells=8)
    again.module.load_state_dict(times.module.state_dict())
    u = fine(11)
    sde = sd.VP()
    assert torch.equal(times.quantile(sde, u), again.quantile(sde, u))
    assert not torch.equal(Learned(cells=8).quantile(sde, u), again.quantile(sde, u))
    section = config.describe(objectives.DSM(times=times))
    assert section["times"] == {"name": "learned", "stratified": True, "cells": 8}
    rebuilt = config.build(section, objectives, "objective")
    assert rebuilt.module.logits.shape == (8,)
    with pytest.raises(sd.ConfigError, match="cells >= 2"):
        config.build({"name": "learned", "cells": 1}, distributions, "times")
