"""Embedded pairs and their per-sample control, on equations with known solutions."""

import math

import pytest
import torch

import scoresde as sd
from scoresde import solvers
from scoresde.bench.convergence import flow
from scoresde.noise import KeyedNoise
from scoresde.sampling import join
from scoresde.solvers.runge_kutta import PAIRS, SPENT, _attempt, solve

f64 = torch.float64


def decay(s, y, rows):
    """``y' = -2 s y``, so that ``y = exp(-s^2)``."""
    return -2 * s[:, None] * y


def rms(error):
    return error.square().mean(1).sqrt()


def run(field, y, start=0.0, end=1.0, method="dopri5", tol=1e-8, **options):
    options = {
        "norm": lambda error, s: rms(error),
        "rtol": tol,
        "atol": tol,
        "first_step": 0.1,
        "max_nfe": 10_000,
        **options,
    }
    return solve(field, y, start, end, PAIRS[method](), **options)


def steps_of(method, count, start=0.2, end=1.4):
    """State and estimated error after ``count`` equal steps of a nonlinear equation."""
    pair = PAIRS[method]()

    def field(s, y, rows):
        return -2 * s[:, None] * y * y

    y, rows = torch.tensor([[1 / (1 + start**2)]], dtype=f64), torch.arange(1)
    h, worst = torch.tensor([(end - start) / count], dtype=f64), 0.0
    for i in range(count):
        s = torch.tensor([start + i * float(h)], dtype=f64)
        y, _, error = _attempt(field, pair, s, s + h, h, y, field(s, y, rows), rows)
        worst = max(worst, float(error.abs()))
    return abs(float(y) - 1 / (1 + end**2)), worst


@pytest.mark.parametrize("method", list(PAIRS))
def test_the_order_of_each_pair_and_of_its_estimate(method):
    pair, (few, many) = PAIRS[method](), (6, 12) if method == "dop853" else (16, 32)
    (coarse, rough), (fine, small) = steps_of(method, few), steps_of(method, many)
    assert math.log2(coarse / fine) == pytest.approx(pair.order, abs=0.45)
    assert math.log2(rough / small) == pytest.approx(pair.estimate, abs=0.45)


@pytest.mark.parametrize("method", list(PAIRS))
def test_each_table_is_consistent(method):
    pair = PAIRS[method]()
    assert len(pair.a) == len(pair.c) - 1 == len(pair.e) - 1
    for row, c in zip(pair.a, pair.c[1:], strict=True):
        assert sum(row) == pytest.approx(c, abs=1e-14)
    assert sum(pair.e) == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.5), (1.5, 0.0), (-1.0, 0.5)])
def test_either_direction_and_nothing_beyond_the_end(start, end):
    seen = []

    def field(s, y, rows):
        seen.append(s)
        return decay(s, y, rows)

    y = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=f64)
    out = run(field, y, start, end)
    torch.testing.assert_close(out.y, y * math.exp(start**2 - end**2), rtol=1e-7, atol=1e-7)
    assert (out.s == end).all()
    seen = torch.cat(seen)
    assert seen.min() >= min(start, end)
    assert seen.max() <= max(start, end)
    assert len(seen) == out.nfe.sum()


def test_the_tolerances_are_those_of_the_larger_end():
    """One step of bosh3 on ``y' = -4 s^3`` ends at 1/12 with an estimated error of 13/48."""

    def field(s, y, rows):
        return (-4 * s**3)[:, None].expand_as(y)

    y = torch.ones(1, 1, dtype=f64)
    for size, one_step in ((0.28, True), (0.26, False)):
        for rtol, atol in ((size, 1e-9), (1e-9, size)):
            out = run(field, y, method="bosh3", rtol=rtol, atol=atol, first_step=1.0)
            assert (int(out.nfe) == 4) == one_step


def test_both_tolerances_reach_the_controller(mixture):
    score = mixture.score(sd.VP())
    tight, absolute, relative = (
        sd.sample(score, (4, 2), solver=solvers.RungeKutta(rtol=rtol, atol=atol)).mean_nfe
        for rtol, atol in ((1e-8, 1e-8), (1e-8, 1e-3), (1e-3, 1e-8))
    )
    assert max(absolute, relative) < tight / 1.5


def test_each_row_is_solved_as_if_it_were_alone():
    rates = torch.tensor([1.0, 40.0, 0.1, 10.0], dtype=f64)

    def field(s, y, rows):
        return torch.cos(rates[rows] * s)[:, None] * y

    y = torch.ones(4, 2, dtype=f64)
    out = run(field, y)
    truth = (torch.sin(rates) / rates).exp()[:, None].expand(4, 2)
    torch.testing.assert_close(out.y, truth, rtol=3e-7, atol=3e-7)
    assert out.nfe[1] > 2 * out.nfe[2]
    for i in range(4):
        alone = run(lambda s, y, rows, i=i: field(s, y, rows + i), y[i : i + 1])
        assert torch.equal(alone.y[0], out.y[i])
        assert alone.nfe[0] == out.nfe[i]


def test_a_row_that_fails_leaves_the_others_alone():
    def field(s, y, rows):
        bad = (rows == 1) & (s > 0.5)
        return torch.where(bad[:, None], math.nan, decay(s, y, rows))

    y = torch.ones(3, 1, dtype=f64)
    out = run(field, y)
    assert list(out.failures) == [1]
    assert "not finite" in out.failures[1]
    assert 0.49 < out.s[1] <= 0.5
    assert float(out.y[1]) == pytest.approx(math.exp(-(float(out.s[1]) ** 2)), abs=1e-7)
    torch.testing.assert_close(out.y[::2], y[::2] / math.e, rtol=1e-7, atol=1e-7)


def test_a_budget_is_each_rows_own():
    rates = torch.tensor([0.1, 300.0], dtype=f64)

    def field(s, y, rows):
        return torch.cos(rates[rows] * s)[:, None] * y

    out = run(field, torch.ones(2, 1, dtype=f64), max_nfe=80)
    assert out.failures == {1: SPENT}
    assert 74 < out.nfe[1] <= 80
    assert out.s[0] == 1
    assert 0 < out.s[1] < 1
    for few in (1, 6):  # not even one step
        out = run(field, torch.ones(2, 1, dtype=f64), max_nfe=few)
        assert out.failures == {0: SPENT, 1: SPENT}
        assert (out.nfe == 1).all()
        assert (out.y == 1).all()


# --- as a solver ------------------------------------------------------------------------------


def test_the_solver_declares_its_pairs():
    found = {name: (make().order, make().nfe_per_step) for name, make in PAIRS.items()}
    assert solvers.RungeKutta.methods == found


def test_batches_are_joined(mixture):
    score, parts = mixture.score(sd.VP()), []
    whole = sd.sample(score, (5, 2), solver="runge-kutta", dtype=f64)
    for start, count in ((0, 3), (3, 2)):
        part = sd.sample(score, (count, 2), solver="runge-kutta", dtype=f64, start_index=start)
        parts.append(part)
    joined = join(parts)
    torch.testing.assert_close(joined.x, whole.x, rtol=0, atol=1e-12)
    assert torch.equal(joined.nfe, whole.nfe)
    assert joined.mean_nfe == pytest.approx(float(whole.nfe.double().mean()))
    assert joined.seconds == sum(part.seconds for part in parts)


def test_samples_do_not_depend_on_their_batch(sde, mixture):
    score = mixture.score(sde)
    whole = sd.sample(score, (9, 2), solver="runge-kutta", dtype=f64)
    assert whole.converged
    assert whole.nfe.shape == (9,)
    assert len(set(whole.nfe.tolist())) > 1
    for start, count in ((0, 1), (3, 4)):
        part = sd.sample(score, (count, 2), solver="runge-kutta", dtype=f64, start_index=start)
        torch.testing.assert_close(part.x, whole.x[start : start + count], rtol=0, atol=1e-12)
        assert torch.equal(part.nfe, whole.nfe[start : start + count])


def test_the_trajectory_is_that_of_the_reference(sde, mixture):
    score, x_T = mixture.score(sde), sde.prior_std * KeyedNoise(1).normal((6, 2), dtype=f64)
    end = flow(score, x_T, sde.t_max, sde.t_min_sampling, 1e-11)
    exact = score.denoise(end, sde.t_min_sampling)
    for method, tolerance in (("dopri5", 1e-5), ("dop853", 1e-8), ("bosh3", 1e-4)):
        solver = solvers.RungeKutta(method, rtol=tolerance, atol=tolerance)
        out = sd.sample(score, x_T=x_T, solver=solver)
        assert (out.x - exact).abs().max() < 30 * tolerance


def test_the_true_count_of_evaluations(mixture):
    seen, score = [], mixture.score(sd.VP())

    def recorded(x, t):
        seen.append(len(x))
        return score(x, t)

    recorded.sde = score.sde
    out = sd.sample(recorded, (5, 2), solver="runge-kutta", dtype=f64)
    assert sum(seen) == out.nfe.sum()  # the last denoising is counted with the rest


def test_labels_go_with_their_samples():
    sde = sd.VP()

    def score(x, t, y):
        assert len(y) == len(x)
        spread = 0.05 + 0.2 * y[:, None]
        std2 = (spread * sde.alpha(t)) ** 2 + sde.sigma(t) ** 2
        return -(x - sde.alpha(t) * y[:, None]) / std2

    score.sde = sde
    y = torch.tensor([0.0, 3.0, 1.0, 2.0], dtype=f64)
    out = sd.sample(score, (4, 1), solver="runge-kutta", dtype=f64, y=y)
    assert len(set(out.nfe.tolist())) > 1
    for i in range(4):
        alone = sd.sample(
            score, (1, 1), solver="runge-kutta", dtype=f64, y=y[i : i + 1], start_index=i
        )
        torch.testing.assert_close(alone.x[0], out.x[i], rtol=0, atol=1e-12)


def test_what_stopped_is_said_and_denoised_from_where_it_is(mixture):
    score = mixture.score(sd.VP())
    solver = solvers.RungeKutta(max_nfe=60)
    out = sd.sample(score, (64, 2), solver=solver, dtype=f64)
    free = sd.sample(score, (64, 2), solver="runge-kutta", dtype=f64)
    stopped = free.nfe > out.nfe
    assert 0 < stopped.sum() < 64  # some make it, some do not
    assert not out.converged
    assert out.message.startswith(f"sample {int(stopped.nonzero()[0])} stopped at t=")
    assert "short of t=0.001, in float64: the evaluations allowed are used up" in out.message
    seen = []
    first = int(stopped.nonzero()[0])
    alone = sd.sample(score, (1, 2), solver=solver, dtype=f64, start_index=first,
                      callback=lambda *what: seen.append(what))  # fmt: skip
    assert f" after {len(seen)} steps tried, short of" in alone.message
    assert alone.message.startswith(out.message.partition(", and ")[0])
    assert 1e-3 < out.t_end < 0.5
    torch.testing.assert_close(out.x[~stopped], free.x[~stopped], rtol=0, atol=1e-12)
    assert (out.x[stopped] - free.x[stopped]).abs().mean() < 0.3  # denoised at their own times


def test_a_callback_sees_each_sample_at_its_time(mixture):
    score, seen = mixture.score(sd.VP()), []
    sd.sample(
        score, (3, 2), solver="runge-kutta", dtype=f64, callback=lambda *state: seen.append(state)
    )
    steps, times, states = zip(*seen, strict=True)
    assert list(steps) == list(range(1, len(seen) + 1))
    assert sorted(times, reverse=True) == list(times)
    assert times[-1] == 1e-3
    assert states[-1].shape == (3, 2)


def test_float32_says_what_it_resolves(mixture):
    solver = solvers.RungeKutta(rtol=1e-8, atol=1e-5)
    with pytest.warns(UserWarning, match="1e-08 is below what float32 resolves: 1e-06 is used"):
        out = sd.sample(mixture.score(sd.VP()), (4, 2), solver=solver, dtype=torch.float32)
    assert out.converged
    assert out.x.dtype == torch.float32
