"""Steps against their published formulas, written out with numbers of the process alone."""

import math

import pytest
import torch

import scoresde as sd
from scoresde import solvers
from scoresde.noise import KeyedNoise
from scoresde.solvers.pndm import WEIGHTS

f64 = torch.float64


def time(value):
    return torch.tensor(value, dtype=f64)


def draw(seed=0):
    return KeyedNoise(seed).normal((4, 2), dtype=f64)


@pytest.mark.parametrize(
    ("churn", "low", "high", "gamma"),
    [
        (0.9, 0.0, math.inf, 0.9 / 18),
        (30.0, 0.05, 50.0, math.sqrt(2) - 1),  # no more than to twice the variance
        (0.9, 2.5, 50.0, 0.0),
        (0.9, 0.0, 1.9, 0.0),
    ],
)
def test_algorithm_2_of_edm(mixture, churn, low, high, gamma):
    sde, z = sd.EDM(), KeyedNoise(5).normal((4, 2), dtype=f64)
    score, t, s, x = mixture.score(sde), time(2.0), time(1.3), 2.0 * draw()
    solver = solvers.EDM(churn, low, high, noise_scale=1.007)
    found, _ = solver.step(solver.reverse(score), x, t, s, KeyedNoise(5), 18)

    t_hat = t * (1 + gamma)
    x_hat = x + (t_hat**2 - t**2).sqrt() * 1.007 * z
    slope = (x_hat - score.denoise(x_hat, t_hat)) / t_hat
    ahead = x_hat + (s - t_hat) * slope
    expected = x_hat + (s - t_hat) * (slope + (ahead - score.denoise(ahead, s)) / s) / 2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_churn_stays_within_the_trained_times(mixture):
    exact, seen = mixture.score(sd.EDM()), []

    def score(x, t):
        seen.append(float(t))
        return exact(x, t)

    score.sde = exact.sde
    sd.sample(score, (2, 2), solver=solvers.EDM(churn=30.0), steps=4)
    assert max(seen) == exact.sde.t_max


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_equation_12_of_ddim(mixture, eta):
    """With ``alpha_bar`` of DDPM for the square of ours, and its standard deviation of eq. 16."""
    sde, x, z = sd.DDPM(), draw(), KeyedNoise(5).normal((4, 2), dtype=f64)
    score, t, s, solver = mixture.score(sde), time(0.6), time(0.5), solvers.DDIM(eta)
    found, _ = solver.step(solver.reverse(score), x, t, s, KeyedNoise(5))

    a, b = sde.alpha(t) ** 2, sde.alpha(s) ** 2
    std = eta * ((1 - b) / (1 - a)).sqrt() * (1 - a / b).sqrt()
    eps = -(1 - a).sqrt() * score(x, t)
    expected = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt()
    expected = expected + (1 - b - std**2).sqrt() * eps + std * z
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["dpm-2s", "dpm-3s", "dpmpp-2s"])
def test_singlestep_methods(sde, mixture, name):
    """DPM-Solver's algorithms 1 and 2, and algorithm 1 of DPM-Solver++ with ``r = 1/2``."""
    score, x = mixture.score(sde), draw()
    t, s = time(0.6 * sde.t_max), time(0.4 * sde.t_max)
    begin, h = sde.log_snr(t), sde.log_snr(s) - sde.log_snr(t)

    def at(r):
        u = sde.time(begin + r * h)
        return u, sde.alpha(u), sde.sigma(u)

    def noise(y, r):
        return -at(r)[2] * score(y, at(r)[0])

    def data(y, r):
        return score.denoise(y, at(r)[0])

    def by_noise(r):
        _, alpha, sigma = at(r)
        return alpha / sde.alpha(t) * x - sigma * torch.expm1(r * h) * noise(x, 0)

    _, alpha, sigma = at(1)
    if name == "dpm-2s":
        middle = noise(by_noise(1 / 2), 1 / 2)
        expected = alpha / sde.alpha(t) * x - sigma * torch.expm1(h) * middle
    elif name == "dpm-3s":
        one, two = 1 / 3, 2 / 3
        first = noise(by_noise(one), one) - noise(x, 0)
        bend = torch.expm1(two * h) / (two * h) - 1
        second = noise(by_noise(two) - at(two)[2] * two / one * bend * first, two) - noise(x, 0)
        bend = torch.expm1(h) / h - 1
        expected = by_noise(1) - sigma / two * bend * second
    else:
        _, a, b = at(1 / 2)
        half = b / sde.sigma(t) * x - a * torch.expm1(-h / 2) * data(x, 0)
        expected = sigma / sde.sigma(t) * x - alpha * torch.expm1(-h) * data(half, 1 / 2)
    solver = sd.config.build(name, solvers, "solver")
    found, _ = solver.step(sde.reverse(score, 0.0), x, t, s, None)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.3])
def test_sa_solver_with_one_value(sde, mixture, strength):
    """Where the denoised state is constant over the step the integral is closed."""
    score, x, z = mixture.score(sde), draw(), KeyedNoise(5).normal((4, 2), dtype=f64)
    t, s = time(0.6 * sde.t_max), time(0.5 * sde.t_max)
    solver = solvers.SASolver(points=1, corrector=0, strength=strength, q_low=0.0, q_high=1e9)
    found, _ = solver.step(solver.reverse(score), x, t, s, KeyedNoise(5))
    h, share = sde.log_snr(s) - sde.log_snr(t), strength**2
    expected = sde.sigma(s) / sde.sigma(t) * torch.exp(-share * h) * x
    expected = expected - sde.alpha(s) * torch.expm1(-(1 + share) * h) * score.denoise(x, t)
    expected = expected + sde.sigma(s) * (-torch.expm1(-2 * share * h)).sqrt() * z
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_sa_solver_is_quiet_outside_its_levels(mixture):
    sde = sd.EDM()  # where the noise level is the time

    def tau(t, s):
        here, ahead = (solvers.multistep.level(sde, time(u)) for u in (t, s))
        return solvers.SASolver(strength=0.4, q_low=0.5, q_high=5.0).tau(here, ahead)

    assert tau(5.0, 4.0) == tau(1.0, 0.5) == 0.4
    assert tau(5.1, 4.0) == tau(1.0, 0.49) == tau(10.0, 8.0) == tau(0.3, 0.1) == 0


@pytest.mark.parametrize("weights", WEIGHTS, ids=len)
def test_the_weights_of_pndm_integrate_polynomials(weights):
    """Of a degree below their number, through the values at 0, -1, -2, ..., from 0 to 1."""
    for degree in range(len(weights)):
        total = sum(w * (-float(j)) ** degree for j, w in enumerate(weights))
        assert total == pytest.approx(1 / (degree + 1), abs=1e-12)


def test_langevin_steps_are_scaled_by_the_power_that_is_kept(sde, mixture):
    """``(alpha_t/alpha_s)^2``, as corrector of PC and alone."""
    reverse, x = sde.reverse(mixture.score(sde)), draw()
    t, s = time(0.6 * sde.t_max), time(0.4 * sde.t_max)
    kept, langevin = (sde.alpha(t) / sde.alpha(s)) ** 2, solvers.Langevin(snr=0.1)

    found, _ = solvers.PC("ancestral", langevin).step(reverse, x, t, s, KeyedNoise(5))
    noise = KeyedNoise(5)
    corrected = langevin.correct(reverse, x, t, kept, noise)
    expected, _ = solvers.Ancestral().step(reverse, corrected, t, s, noise)
    torch.testing.assert_close(found, expected)

    found, _ = langevin.step(reverse, x, t, s, KeyedNoise(5))
    y = sde.alpha(s) / sde.alpha(t) * x
    expected = langevin.correct(reverse, y, s, kept, KeyedNoise(5))
    torch.testing.assert_close(found, expected)
