"""Adaptive steps of the reverse SDE: its law, its errors, each sample at its own pace."""

import math

import pytest
import torch

import scoresde as sd
from scoresde import grids, solvers
from scoresde.bench.convergence import GaussianData, order
from scoresde.brownian import BrownianPath
from scoresde.noise import KeyedNoise

D64 = {"dtype": torch.float64}


class Fixed(solvers.AdaptiveSDE):
    """The same steps along a grid."""

    integrate = solvers.Solver.integrate


class Fresh(solvers.AdaptiveSDE):
    """New noise for every attempt, as in public code."""

    def normal(self, path, here, start, end):
        _, ahead = super().normal(path, here, start, end)
        if not hasattr(path, "draws"):
            path.draws = KeyedNoise(int(1e9 * float(end.sum())))
        return path.draws.normal(tuple(here.shape), **D64), ahead


def ends(sde):
    return torch.tensor([sde.t_max, sde.t_min_sampling], **D64)


def solve(solver, score, x, noise=None):
    noise = noise or BrownianPath(1)
    return solver.integrate(solver.reverse(score), x, ends(score.sde), noise)


def test_a_step_is_stochastic_improved_euler(sde, mixture):
    """In ``z`` and the log-SNR, by finite differences and quadrature of the process alone."""
    score = mixture.score(sde)
    t, s = 0.5 * ends(sde)[0], 0.45 * ends(sde)[0]
    x = float(sde.sigma(t)) * torch.randn(3, 2, generator=torch.Generator().manual_seed(0), **D64)
    found, _ = solvers.AdaptiveSDE().step(sde.reverse(score), x, t, s, KeyedNoise(3))
    n, h = KeyedNoise(3).normal((3, 2), **D64), sde.log_snr(s) - sde.log_snr(t)

    def scale(u):
        return 1 / (sde.alpha(u) ** 2 + sde.sigma(u) ** 2).sqrt()

    def slope(z, u):
        """``dz/d lam`` of the reversed process, from its drift in t and the change of scale."""
        e = 1e-6 * u
        rate = (sde.log_snr(u + e) - sde.log_snr(u - e)) / (2 * e)
        growth = (scale(u + e).log() - scale(u - e).log()) / (2 * e)
        return (scale(u) * sde.reverse(score).drift(z / scale(u), u) + growth * z) / rate

    lam = torch.linspace(0, 1, 2001, **D64) * h + sde.log_snr(t)
    sin2 = torch.sigmoid(-2 * lam)
    kick = (2 * torch.trapezoid(sin2, lam)).sqrt() * n
    z = scale(t) * x
    k = h * slope(z, t) + kick
    expected = z + (k + h * slope(z + k, s) + kick) / 2
    rtol = 1e-2 if isinstance(sde, sd.DDPM) else 1e-5  # its rate has jumps
    torch.testing.assert_close(scale(s) * found, expected, rtol=rtol, atol=rtol)


def test_equal_steps_are_of_weak_order_two(sde):
    data = GaussianData(torch.tensor([0.5, -0.3]), torch.diag(torch.tensor([0.09, 0.64])))
    coarse, fine = (
        data.weak_error(Fixed(), sde, grids.LogSNR()(sde, steps, sde.t_max, sde.t_min_sampling))
        for steps in (100, 200)
    )
    assert order(coarse, fine) == pytest.approx(solvers.AdaptiveSDE.order, abs=0.1)
    assert fine < 0.01


def moments(solver, sde, n=2500):
    """Error of the mean and ratio of the variances to the exact ones, on Gaussian data."""
    mean, std = torch.tensor([0.5, -0.3], **D64), torch.tensor([0.3, 0.9], **D64)
    score = sd.GaussianMixture([1.0], mean[None], std[None]).score(sde)

    def exact(t):
        return sde.alpha(t) * mean, (sde.alpha(t) ** 2 * std**2 + sde.sigma(t) ** 2).sqrt()

    at, spread = exact(sde.t_max)
    out = solve(solver, score, at + spread * KeyedNoise(9).normal((n, 2), **D64))
    assert out.converged
    at, spread = exact(sde.t_min_sampling)
    z = (out.x - at) / spread
    return z.mean(0), torch.cov(z.T), out


@pytest.mark.parametrize("name", ["VP", "VE", "Linear"])
def test_mean_and_covariance(name):
    solver = solvers.AdaptiveSDE(e_abs=0.1, e_rel=0.1)
    mean, covariance, _ = moments(solver, getattr(sd, name)())
    assert mean.abs().max() < 4 / 2500**0.5
    assert (covariance - torch.eye(2)).abs().max() < 4 * (2 / 2500) ** 0.5


def test_fresh_noise_after_a_rejection_would_be_biased():
    """The drift is what a rejection opposes: too large a variance, and no tolerance mends it."""
    for tolerance, excess in ((0.1, 0.2), (0.03, 0.4)):
        _, covariance, _ = moments(Fresh(e_abs=tolerance, e_rel=tolerance), sd.VP(), 1000)
        assert float(covariance[0, 0]) - 4 * (2 / 1000) ** 0.5 > 1
        assert float(covariance[0, 0]) > 1 + excess


@pytest.fixture(scope="module")
def problem():
    means = torch.tensor([[1.0, 0.6], [-1.0, 0.4], [0.0, -1.0]], **D64)
    stds = torch.tensor([[0.3, 0.4], [0.4, 0.25], [0.35, 0.3]], **D64)
    score = sd.GaussianMixture([1.0, 1.0, 1.0], means, stds).score(sd.VP())
    return score, score.sde.prior_sample((64, 2), KeyedNoise(0), **D64)


def test_tighter_tolerances_approach_the_end_of_the_path(problem):
    """And that of other solvers on the same path."""
    score, x = problem
    reference = sd.sample(
        score, x_T=x, solver="sde-dpmpp-2m", steps=400, seed=1, brownian=True, denoise=False
    ).x
    errors, costs = [], []  # medians: a path that goes to another mode would drown the rest
    for tolerance in (0.3, 0.1, 0.03):
        out = solve(solvers.AdaptiveSDE(e_abs=tolerance, e_rel=tolerance), score, x)
        errors.append(float((out.x - reference).norm(dim=1).median()))
        costs.append(float(out.nfe.double().mean()))
    assert errors[0] > 1.3 * errors[1] > 1.3**2 * errors[2]
    assert costs[0] < costs[1] < costs[2] < 200
    assert errors[2] < errors[0] / 3


@pytest.mark.parametrize("name", ["VP", "VE", "EDM", "DDPM"])
def test_a_sample_does_not_depend_on_its_batch(problem, name):
    score = problem[0].mixture.score(getattr(sd, name)())
    batch = sd.sample(score, (5, 2), solver="adaptive-sde", seed=4)
    alone = sd.sample(score, (1, 2), solver="adaptive-sde", seed=4, start_index=3)
    torch.testing.assert_close(batch.x[3:4], alone.x, rtol=1e-9, atol=1e-9)
    assert int(batch.nfe[3]) == int(alone.nfe[0])
    assert len(batch.nfe.unique()) > 1
    assert batch.brownian


def test_rounding_does_not_move_the_steps(problem):
    """A float32 network differs in its last digits from batch to batch: here by 1e-6."""
    exact = problem[0]

    def score(x, t, off):
        return exact(x, t) * (1 + 1e-6 * off[:, None])

    score.sde = exact.sde
    x, off = torch.zeros(40, 2, **D64), torch.ones(40, **D64)
    one, two = (
        sd.sample(score, x_T=x, solver="adaptive-sde", seed=4, off=scale * off)
        for scale in (1.0, -1.0)
    )
    assert torch.equal(one.nfe, two.nfe)
    assert (one.x - two.x).abs().max() < 1e-3


def test_the_relative_tolerance_counts(problem):
    score, x = problem
    costs = [
        float(solve(solvers.AdaptiveSDE(e_abs=0.01, e_rel=e_rel), score, x).nfe.double().mean())
        for e_rel in (0.0, 0.3)
    ]
    assert costs[1] < 0.7 * costs[0]


def test_conditions_go_with_their_samples(problem):
    """Samples leave the batch at different times, and conditions with them."""
    score, x = problem
    shift = torch.linspace(-1, 1, len(x), **D64)[:, None]
    mean = torch.zeros(1, 2, **D64)
    base = sd.GaussianMixture([1.0], mean, [0.02]).score(score.sde)

    def shifted(y, t, to):
        return base(y - score.sde.alpha(t) * to, t)

    reverse = sd.Reverse(score.sde, shifted, 1.0, {"to": shift})
    out = solvers.AdaptiveSDE(e_abs=0.1).integrate(reverse, x, ends(score.sde), KeyedNoise(0))
    assert out.converged
    assert len(out.nfe.unique()) > 3
    assert (out.x - shift).abs().max() < 0.5


def test_evaluations_are_counted_one_by_one(problem):
    exact, x = problem
    rows = []

    def score(y, t):
        rows.append(len(y))
        return exact(y, t)

    solver = solvers.AdaptiveSDE(e_abs=0.2)
    out = solver.integrate(exact.sde.reverse(score), x, ends(exact.sde), KeyedNoise(0))
    assert sum(rows) == int(out.nfe.sum())
    assert min(rows) < len(x)


def test_a_spent_budget_says_which_sample_and_where(problem):
    score, x = problem
    out = solve(solvers.AdaptiveSDE(max_nfe=20), score, x)
    assert not out.converged
    assert "sample 0 stopped at t=" in out.message
    seen = []
    solver = solvers.AdaptiveSDE(max_nfe=20)
    alone = solver.integrate(
        solver.reverse(score), x[:1], ends(score.sde), BrownianPath(1),
        lambda *what: seen.append(what),
    )  # fmt: skip
    assert f" after {len(seen)} steps tried, short of t=0.001" in alone.message
    assert out.message == f"{alone.message}, and 63 more"
    assert out.message.endswith("in float64: the evaluations allowed are used up, and 63 more")
    assert (out.t > 1e-3).all()
    assert int(out.nfe.max()) <= 20
    drawn = sd.sample(score, (3, 2), solver={"name": "adaptive-sde", "max_nfe": 20})
    assert not drawn.converged
    assert int(drawn.nfe.max()) <= 21


def test_values_that_are_not_finite_are_reported(problem):
    exact, x = problem

    def score(y, t):
        return exact(y, t) * torch.where(y[:, :1] * 0 + t < 0.3, math.nan, 1.0)

    out = solve_bare(exact.sde, score, x.float()[:4])
    assert not out.converged
    assert "sample 0 stopped at t=0.3" in out.message
    assert "in float32: the right-hand side is not finite, and 3 more" in out.message
    assert out.x.isfinite().all()
    assert ((out.t > 0.29) & (out.t < 0.4)).all()


def solve_bare(sde, score, x):
    return solvers.AdaptiveSDE().integrate(sde.reverse(score), x, ends(sde), KeyedNoise(0))


def test_an_infinite_log_snr_is_refused(problem):
    score, x = problem
    times = torch.tensor([1.0, 0.0], **D64)
    with pytest.raises(ValueError, match="AdaptiveSDE needs a finite log-SNR at t=1 and t=0"):
        solvers.AdaptiveSDE().integrate(score.sde.reverse(score), x, times, KeyedNoise(0))


def test_the_callback_sees_the_largest_time(problem):
    score, x = problem
    seen = []
    solver = solvers.AdaptiveSDE(e_abs=0.2)
    out = solver.integrate(
        solver.reverse(score), x, ends(score.sde), KeyedNoise(0), lambda *a: seen.append(a)
    )
    steps, times, states = zip(*seen, strict=True)
    assert list(steps) == list(range(1, len(seen) + 1))
    assert list(times) == sorted(times, reverse=True)
    assert times[-1] == out.t == 1e-3
    assert torch.equal(states[-1], out.x)
