"""Convergence: measured orders, and exact moments of the stochastic schemes.

On Gaussian data every step is affine in state and noise, ``x_s = A x + b + C z``. Probing a step
with chosen states and noise gives ``A``, ``b`` and ``C``, and with them the exact mean and
covariance of what the scheme samples: weak errors without Monte Carlo.
"""

import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import solve_ivp

import scoresde as sd
from scoresde import grids, solvers
from scoresde.noise import KeyedNoise

MEAN = torch.tensor([0.5, -0.3], dtype=torch.float64)
_TURN = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=torch.float64)
COVARIANCE = _TURN @ torch.diag(torch.tensor([0.04, 1.0], dtype=torch.float64)) @ _TURN.T
EYE = torch.eye(2, dtype=torch.float64)

STOCHASTIC = [
    solvers.EulerMaruyama(),
    solvers.EulerMaruyama(eta=0.5),
    solvers.ReverseDiffusion(),
    solvers.Ancestral(),
    solvers.Ancestral("large"),
    solvers.DDIM(eta=0.5),
    solvers.DDIM(eta=1.0),
]
DETERMINISTIC = [solvers.EulerMaruyama(eta=0.0), solvers.DDIM(), solvers.Heun()]


class Rows(KeyedNoise):
    """Noise that is given, not drawn."""

    def __init__(self, rows):
        super().__init__(0)
        self.rows = rows

    def normal(self, shape, device=None, dtype=None):
        assert shape == tuple(self.rows.shape)
        return self.rows.to(dtype)


def marginal(sde, t):
    """Mean and covariance of ``p_t``."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    return alpha * MEAN, alpha**2 * COVARIANCE + sigma**2 * EYE


def gaussian_score(sde):
    def score(x, t):
        mean, covariance = marginal(sde, t)
        return -torch.linalg.solve(covariance, (x - mean).T).T

    return score


def moments(solver, sde, times):
    """Exact mean and covariance that the scheme gives, started from the exact ``p_t``."""
    reverse = sde.reverse(gaussian_score(sde), eta=solver.eta)
    probes = torch.cat([torch.zeros(1, 2), torch.eye(2), torch.zeros(2, 2)]).double()
    noise = Rows(torch.cat([torch.zeros(3, 2), torch.eye(2)]).double())
    mean, covariance = marginal(sde, times[0])
    for t, s in pairwise(times):
        out, _ = solver.step(reverse, probes, t, s, noise, None)
        b, a, c = out[0], (out[1:3] - out[0]).T, (out[3:5] - out[0]).T
        mean, covariance = a @ mean + b, a @ covariance @ a.T + c @ c.T
    return mean, covariance


def weak_error(solver, sde, steps):
    """Largest error of mean and covariance, relative to the exact standard deviations."""
    times = grids.LogSNR()(sde, steps, sde.t_max, sde.t_min_sampling)
    mean, covariance = moments(solver, sde, times)
    exact_mean, exact = marginal(sde, times[-1])
    factor = torch.linalg.inv(torch.linalg.cholesky(exact))
    return max(
        float((factor @ (mean - exact_mean)).norm()),
        float((factor @ (covariance - exact) @ factor.T).norm()),
    )


@pytest.mark.parametrize("solver", STOCHASTIC, ids=repr)
def test_weak_order_one_and_moments(sde, solver):
    """Errors of mean and covariance halve with the step, and are small at 400 steps."""
    coarse, fine = weak_error(solver, sde, 200), weak_error(solver, sde, 400)
    slope = math.log2(coarse / fine)
    assert slope > solver.order - 0.1
    # Where sigma is geometric in time and alpha constant, Euler's leading error nearly cancels.
    lucky = isinstance(sde, sd.VE) and solver == solvers.EulerMaruyama()
    assert slope < solver.order + 0.1 or lucky
    assert fine < 0.05


def test_the_moment_test_sees_a_wrong_noise_scale():
    class Wrong(solvers.EulerMaruyama):
        def step(self, reverse, x, t, s, noise, state=None):
            noisy, _ = super().step(reverse, x, t, s, noise)
            mean = x + (s - t) * reverse.drift(x, t)
            return mean + 1.05 * (noisy - mean), state

    assert weak_error(Wrong(), sd.VP(), 400) > 0.05


def flow(score, x, start, end):
    """The probability-flow ODE as ``dy/dk = q eps``, ``y = x/alpha``, ``k = log q``, by scipy."""
    # DDPM has the (alpha, sigma) of VP at other times, and VP's times are smooth.
    if isinstance(score.sde, sd.DDPM):
        start, end = (sd.VP(t_max=1.1).time(score.sde.log_snr(t)) for t in (start, end))
        score = score.mixture.score(sd.VP(t_max=1.1))
    sde = score.sde

    def velocity(k, y):
        t = sde.time(torch.tensor(-k, dtype=torch.float64))
        eps = score.noise(sde.alpha(t) * torch.from_numpy(y).reshape(x.shape), t)
        return (math.exp(k) * eps).flatten().numpy()

    span = (-float(sde.log_snr(start)), -float(sde.log_snr(end)))
    y = (x / sde.alpha(start)).flatten().numpy()
    out = solve_ivp(velocity, span, y, method="DOP853", rtol=1e-9, atol=1e-9)
    return sde.alpha(end) * torch.from_numpy(out.y[:, -1]).reshape(x.shape)


@pytest.fixture(scope="module")
def references():
    return {}


@pytest.mark.parametrize("solver", DETERMINISTIC, ids=repr)
def test_order_of_the_trajectory(sde, mixture, solver, references):
    """Slope of the error against a tight reference solution in other variables."""
    score = mixture.score(sde)
    start, end = sde.t_max, sde.t_min_sampling
    x = sde.prior_sample((32, 2), KeyedNoise(1), dtype=torch.float64)
    if sde not in references:
        references[sde] = flow(score, x, start, end)

    def error(steps):
        times = grids.LogSNR()(sde, steps, start, end)
        found = solver.integrate(solver.reverse(score), x, times).x
        return float((found - references[sde]).square().mean().sqrt())

    slope = math.log2(error(400) / error(800))
    assert slope == pytest.approx(solver.order, abs=0.1)
