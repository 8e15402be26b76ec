"""Adaptive methods: accuracy, budget, per-sample error, and what is said on failure."""

import pytest
import torch

import scoresde as sd
from scoresde import solvers
from scoresde.noise import KeyedNoise

KINDS = (solvers.ODE, solvers.ODEScipy, solvers.RungeKutta)
ADAPTIVE = [kind(m) for kind in KINDS for m in kind.methods]
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
    return solve(
        solvers.ODEScipy("DOP853", rtol=1e-11, atol=1e-11, together=True), score, prior()
    ).x


@pytest.mark.parametrize("solver", ADAPTIVE, ids=repr)
def test_the_error_follows_the_tolerance(score, exact, solver):
    kind = type(solver)
    for tolerance in (1e-3, 1e-5):
        tight = kind(solver.method, rtol=tolerance, atol=tolerance, max_nfe=100_000)
        out = solve(tight, score, prior())
        assert out.converged
        assert out.t == 1e-3
        assert out.nfe.shape == (8,)
        assert (out.x - exact).abs().max() < 100 * tolerance


@pytest.mark.parametrize("kind", [solvers.ODE, solvers.ODEScipy])
def test_a_table_whose_rate_jumps_costs_no_order(mixture, kind):
    """DDPM's: in t the error would stay at 6e-4, at four times the evaluations."""
    score = mixture.score(sd.DDPM())
    tight = solvers.RungeKutta("dop853", rtol=1e-11, atol=1e-11, max_nfe=10**5)
    times, seen = [], []
    out = solve(
        kind(rtol=1e-6, atol=1e-6), score, prior(), callback=lambda i, t, x: times.append(t)
    )
    assert out.converged
    assert (out.x - solve(tight, score, prior()).x).abs().max() < 1e-5
    assert out.nfe.double().mean() < 150
    assert (times[0], times[-1]) == (1.0, 1e-3)

    def recorded(x, t):
        seen.append(float(t))
        return score(x, t)

    recorded.sde = score.sde
    up = solve(kind(), recorded, out.x, ENDS.flip(0))
    assert (up.x - prior()).abs().max() < 2e-3
    assert (min(seen), max(seen)) == (1e-3, 1.0)
    short = solve(kind(max_nfe=40), score, prior(2))
    assert "stopped after 40 evaluations at t=0." in short.message
    assert bool(((short.t > 1e-3) & (short.t < 1)).all())


@pytest.mark.parametrize("kind", [solvers.ODE, solvers.ODEScipy])
def test_all_together_is_as_exact_and_counts_once(score, exact, kind):
    solver = kind(together=True)
    reverse = solver.reverse(score)
    out = solver.integrate(reverse, prior(), ENDS)
    assert out.nfe is None
    assert reverse.nfe > 0
    assert (out.x - exact).abs().max() < 1e-3
    apart = solve(kind(), score, prior())
    assert len(set(apart.nfe.tolist())) > 1
    assert not torch.equal(apart.x, out.x)  # the steps are others


@pytest.mark.parametrize("kind", [solvers.ODE, solvers.ODEScipy])
def test_samples_do_not_depend_on_their_batch(sde, mixture, kind):
    score = mixture.score(sde)
    settings = {"solver": kind(rtol=1e-3, atol=1e-3), "dtype": torch.float64}
    whole = sd.sample(score, (5, 2), **settings)
    for start, count in ((3, 1), (1, 2)):
        part = sd.sample(score, (count, 2), start_index=start, **settings)
        assert torch.equal(part.x, whole.x[start : start + count])
        assert torch.equal(part.nfe, whole.nfe[start : start + count])


@pytest.mark.parametrize("kind", [solvers.ODE, solvers.ODEScipy])
def test_conditions_go_with_their_samples(kind):
    sde = sd.VP()

    def score(x, t, y):
        assert len(y) == len(x)
        std2 = (0.3 * sde.alpha(t)) ** 2 + sde.sigma(t) ** 2
        return -(x - sde.alpha(t) * y[:, None]) / std2

    score.sde = sde
    y = torch.tensor([0.0, 3.0, -2.0], dtype=torch.float64)
    out = sd.sample(score, (3, 1), solver=kind(), dtype=torch.float64, y=y)
    z = sde.prior_sample((3, 1), KeyedNoise(0), dtype=torch.float64)[:, 0]

    def law(t):
        return sde.alpha(t) * y, ((0.3 * sde.alpha(t)) ** 2 + sde.sigma(t) ** 2).sqrt()

    (m_T, s_T), (m, s), end = law(1.0), law(1e-3), torch.tensor(1e-3)
    x = m + s * (z - m_T) / s_T  # the flow keeps the place within the Gaussian
    exact = (x + sde.sigma(end) ** 2 * score(x[:, None], end, y)[:, 0]) / sde.alpha(end)
    torch.testing.assert_close(out.x[:, 0], exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", [solvers.ODE, solvers.ODEScipy])
def test_a_callback_sees_each_sample_at_its_time(score, kind):
    seen, x = [], prior(3)
    out = solve(kind(), score, x, ENDS, lambda *state: seen.append(state))
    steps, times, states = zip(*seen, strict=True)
    assert list(steps) == list(range(1, len(seen) + 1))
    assert sorted(times, reverse=True) == list(times)
    assert (times[0], times[-1]) == (1.0, 1e-3)
    assert torch.equal(states[0][1:], x[1:])  # the first sample moves first
    assert not torch.equal(states[0][0], x[0])
    assert torch.equal(states[-1], out.x)


@pytest.mark.parametrize("kind", [solvers.ODE, solvers.ODEScipy])
def test_a_callback_on_the_way_up_is_told_the_smallest_time(score, kind):
    times = []
    solve(kind(), score, prior(2), ENDS.flip(0), lambda step, t, x: times.append(t))
    assert sorted(times) == times
    assert times[0] == times[len(times) // 3] == float(ENDS[-1])
    assert times[-1] == float(ENDS[0])


@pytest.mark.parametrize("method", list(solvers.ODE.methods))
def test_an_attempt_costs_what_is_declared(score, method):
    solver = solvers.ODE(method, together=True)
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
    solve(solvers.ODE(rtol=1e-2, atol=1e-2, together=True), recorded, prior())
    assert times.count(1e-3) <= 1  # the last stages come to rest just above
    assert min(times) == pytest.approx(1e-3, rel=1e-12)


@pytest.mark.parametrize("kind", [solvers.ODE, solvers.ODEScipy])
def test_a_spent_budget_returns_what_there_is(score, exact, kind):
    seen, solver = [], kind(max_nfe=40, together=True)
    reverse = solver.reverse(score)
    out = solver.integrate(reverse, prior(), ENDS, None, lambda *a: seen.append(a))
    assert reverse.nfe == 40
    assert not out.converged
    assert 1e-3 < out.t < 1
    assert out.message.startswith(f"stopped after 40 evaluations at t={out.t:.6g}, short of")
    assert f"after {seen[-1][0]} steps, in float64: raise max_nfe" in out.message
    assert out.t == seen[-1][1]
    rest = solve(kind(), score, out.x, torch.tensor([out.t, 1e-3], dtype=torch.float64))
    assert (rest.x - exact).abs().max() < 1e-3  # the state does belong to the time


@pytest.mark.parametrize("kind", [solvers.ODE, solvers.ODEScipy])
def test_a_budget_is_each_samples_own(score, kind):
    free = solve(kind(), score, prior())
    limit = int(free.nfe.sort().values[4])  # enough for some
    out = solve(kind(max_nfe=limit), score, prior())
    short = free.nfe > limit
    assert 0 < short.sum() < 8
    assert not out.converged
    assert out.message.startswith(f"sample {int(short.nonzero()[0])}: stopped after {limit} eval")
    assert torch.equal(out.t > 1e-3, short)
    assert torch.equal(out.x[~short], free.x[~short])
    assert (out.nfe[short] == limit).all()
    assert torch.equal(out.nfe[~short], free.nfe[~short])


def test_no_sample_hides_in_the_mean_of_its_batch():
    """One sample costs the same, and is as exact, beside 500 that stand still."""
    sde = sd.VP()
    modes = sd.GaussianMixture([0.5, 0.5], torch.tensor([[-1.0], [1.0]]).double(), [0.05, 0.05])

    def score(x, t):  # white noise of unit variance does not move
        return torch.cat([modes.score(sde)(x[:1], t), -x[1:]])

    score.sde = sde
    solver, results = solvers.ODE(together=True), []
    for neighbours in (0, 500):
        x = torch.zeros(1 + neighbours, 1, dtype=torch.float64)
        x[0] = 0.01
        reverse = solver.reverse(score)
        out = solver.integrate(reverse, x, ENDS)
        results.append((reverse.nfe, float(out.x[0])))
    assert results[0] == results[1]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kind", [solvers.ODE, solvers.ODEScipy])
def test_a_score_that_breaks_down_is_reported(score, kind, together):
    def broken(x, t):
        return score(x, t) * (float("nan") if t < 0.5 else 1.0)

    broken.sde = score.sde
    out = solve(kind(together=together), broken, prior(2, dtype=torch.float32))
    t = float(torch.as_tensor(out.t).flatten()[0])
    assert not out.converged
    assert 0.5 <= t < 1
    assert bool(out.x.isfinite().all())
    assert "float32" in out.message
    assert f"t={t:.6g}" in out.message
    assert together or out.message.startswith("sample 0: ")
    assert together or out.message.endswith("and 1 more")


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
