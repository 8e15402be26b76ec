"""Adaptive methods: accuracy, budget, per-sample error, and what is said on failure."""

import pytest
import torch

import scoresde as sd
from scoresde import solvers
from scoresde.noise import KeyedNoise

ADAPTIVE = [solvers.ODE(m) for m in solvers.ODE.methods] + [
    kind(m) for kind in (solvers.ODEScipy, solvers.RungeKutta) for m in kind.methods
]
ENDS = torch.tensor([1.0, 1e-3], dtype=torch.float64)


def prior(n=8, dtype=torch.float64):
    return KeyedNoise(1).normal((n, 2), dtype=dtype)


def solve(solver, score, x, times=ENDS, callback=None):
    return solver.integrate(solver.reverse(score), x, times, None, callback)


@pytest.fixture
def score(mixture):
    return mixture.score(sd.VP())


@pytest.fixture
def exact(score):
    return solve(solvers.ODEScipy("DOP853", rtol=1e-11, atol=1e-11), score, prior()).x


@pytest.mark.parametrize("solver", ADAPTIVE, ids=repr)
def test_the_error_follows_the_tolerance(score, exact, solver):
    kind = type(solver)
    for tolerance in (1e-3, 1e-5):
        tight = kind(solver.method, rtol=tolerance, atol=tolerance, max_nfe=100_000)
        out = solve(tight, score, prior())
        assert out.converged
        assert out.t == 1e-3
        assert (out.x - exact).abs().max() < 100 * tolerance


@pytest.mark.parametrize("method", list(solvers.ODE.methods))
def test_an_attempt_costs_what_is_declared(score, method):
    solver = solvers.ODE(method)
    reverse, steps = solver.reverse(score), []
    solver.integrate(reverse, prior(), ENDS, None, lambda i, t, x: steps.append((i, t)))
    assert [i for i, _ in steps] == list(range(1, len(steps) + 1))
    assert steps[-1][1] == 1e-3
    assert sorted((t for _, t in steps), reverse=True) == [t for _, t in steps]
    attempts, left = divmod(reverse.nfe - 2, solver.nfe_per_step)  # 2 to choose the first step
    assert left == 0
    assert attempts >= len(steps)


def test_torchdiffeq_does_not_step_past_the_end(score):
    """The clamp at ``t_end`` acts on nothing but the guess of the first step."""
    times = []

    def recorded(x, t):
        times.append(float(t))
        return score(x, t)

    recorded.sde = score.sde
    solve(solvers.ODE(rtol=1e-2, atol=1e-2), recorded, prior())
    assert times.count(1e-3) <= 1  # the last stages come to rest just above
    assert min(times) == pytest.approx(1e-3, rel=1e-12)


@pytest.mark.parametrize("kind", [solvers.ODE, solvers.ODEScipy])
def test_a_spent_budget_returns_what_there_is(score, exact, kind):
    seen, solver = [], kind(max_nfe=40)
    reverse = solver.reverse(score)
    out = solver.integrate(reverse, prior(), ENDS, None, lambda *a: seen.append(a))
    assert reverse.nfe == 40
    assert not out.converged
    assert 1e-3 < out.t < 1
    assert out.message.startswith(f"stopped after 40 evaluations at t={out.t:.6g}, short of")
    assert "in float64: raise max_nfe" in out.message
    assert out.t == seen[-1][1]
    rest = solve(kind(), score, out.x, torch.tensor([out.t, 1e-3], dtype=torch.float64))
    assert (rest.x - exact).abs().max() < 1e-3  # the state does belong to the time


def test_no_sample_hides_in_the_mean_of_its_batch():
    """One sample costs the same, and is as exact, beside 500 that stand still."""
    sde = sd.VP()
    modes = sd.GaussianMixture([0.5, 0.5], torch.tensor([[-1.0], [1.0]]).double(), [0.05, 0.05])

    def score(x, t):  # white noise of unit variance does not move
        return torch.cat([modes.score(sde)(x[:1], t), -x[1:]])

    score.sde = sde
    solver, results = solvers.ODE(), []
    for neighbours in (0, 500):
        x = torch.zeros(1 + neighbours, 1, dtype=torch.float64)
        x[0] = 0.01
        reverse = solver.reverse(score)
        out = solver.integrate(reverse, x, ENDS)
        results.append((reverse.nfe, float(out.x[0])))
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", [solvers.ODE, solvers.ODEScipy])
def test_a_score_that_breaks_down_is_reported(score, kind):
    def broken(x, t):
        return score(x, t) * (float("nan") if t < 0.5 else 1.0)

    broken.sde = score.sde
    out = solve(kind(), broken, prior(dtype=torch.float32))
    assert not out.converged
    assert out.t > 0.5
    assert bool(out.x.isfinite().all())
    assert "float32" in out.message
    assert f"t={out.t:.6g}" in out.message


@pytest.mark.parametrize("kind", [solvers.ODE, solvers.ODEScipy])
def test_a_state_in_float32(score, exact, kind):
    out = solve(kind(), score, prior(dtype=torch.float32))
    assert out.x.dtype == torch.float32
    assert (out.x - exact).abs().max() < 1e-3


def test_one_step_of_a_grid(score):
    """An adaptive solver also serves as the step of a loop."""
    solver, x = solvers.ODE(), prior()
    t, s = torch.tensor([0.5, 0.4], dtype=torch.float64)
    stepped, _ = solver.step(solver.reverse(score), x, t, s, None, None)
    torch.testing.assert_close(stepped, solve(solver, score, x, torch.stack([t, s])).x)
