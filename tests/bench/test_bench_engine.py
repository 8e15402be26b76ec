"""The comparison against closed forms: true errors, true NFE, and failures kept in their rows."""

import math
import warnings

import pytest
import torch

import scoresde as sd
from scoresde.bench import Row, Target, compare, mixture
from scoresde.bench.engine import against_best
from scoresde.bench.row import MEASURES, label
from scoresde.bench.target import moment_errors
from scoresde.bench.text import doubtful, report, table, verdict
from scoresde.noise import KeyedNoise
from scoresde.solvers import DDIM, ODE, PC, Langevin, RungeKutta

TIGHT = RungeKutta("dop853", rtol=1e-10, atol=1e-10, max_nfe=10000)
TOGETHER = ODE(together=True)
LAW = mixture(2)


@pytest.fixture(scope="module")
def target():
    return Target.exact(LAW, samples=600)


@pytest.fixture(scope="module")
def rows(target):
    return compare(
        LAW.score(sd.VP()), target, solvers=["heun", "ddim", "ancestral", TOGETHER],
        steps=[5, 10, 20, 40, 80], samples=600, endpoint=TIGHT,
    )  # fmt: skip


def of(rows, solver):
    return [row for row in rows if row.solver == solver]


def test_rows_come_in_order_and_adaptive_solvers_once(rows):
    expected = [(s, n) for s in ("heun", "ddim", "ancestral") for n in (5, 10, 20, 40, 80)]
    assert [(row.solver, row.steps) for row in rows] == [*expected, (label(TOGETHER), None)]
    assert all(row.converged and row.seconds > 0 for row in rows)


def test_evaluations_are_those_of_the_score(target):
    calls = []

    class Counting:
        sde, shape = sd.VP(), (2,)
        device, dtype = torch.device("cpu"), torch.float64

        def __call__(self, x, t):
            calls.append(len(x))
            return LAW.score(self.sde)(x, t)

    for name in ("heun", "ddim", TOGETHER):
        calls.clear()
        (row,) = compare(Counting(), target, solvers=[name], steps=[7], samples=50)
        warm_up = 2
        assert row.nfe == len(calls) - warm_up
    assert [of(compare(Counting(), target, solvers=[s], steps=[7], samples=50), s)[0].nfe
            for s in ("heun", "ddim", "ancestral")] == [15, 8, 8]  # fmt: skip


def test_endpoint_error_falls_at_the_order_of_the_solver(rows):
    """Halving the step divides the error by ``2^order``; stochastic solvers have no endpoint."""
    for name, order in (("heun", 2), ("ddim", 1)):
        errors = [row.endpoint_rms for row in of(rows, name)]
        assert math.log2(errors[-2] / errors[-1]) == pytest.approx(order, abs=0.35)
    assert of(rows, label(TOGETHER))[0].endpoint_rms < 1e-3
    assert all(row.endpoint_rms is None for row in of(rows, "ancestral"))


def test_endpoint_of_one_gaussian_is_the_closed_form():
    """For ``N(0, s^2)`` the ODE maps ``x_T`` to ``x_T std(t_end)/std(t_max)``, then denoises."""
    sde, s = sd.VP(), 0.5
    law = sd.GaussianMixture([1.0], torch.zeros(1, 3, dtype=torch.float64), [s])
    target = Target.exact(law, samples=40)
    (row,) = compare(law.score(sde), target, solvers=["ddim"], steps=[4], samples=40, seed=3,
                     endpoint=TIGHT)  # fmt: skip
    x_T = sde.prior_sample((40, 3), KeyedNoise(3), dtype=torch.float64)

    def std(t):
        return (sde.alpha(t) ** 2 * s**2 + sde.sigma(t) ** 2).sqrt()

    end = sde.t_min_sampling
    truth = x_T * std(end) / std(sde.t_max) * (sde.alpha(end) * s**2 / std(end) ** 2)
    out = sd.sample(law.score(sde), x_T=x_T, solver="ddim", steps=4, seed=3).x
    expected = float((out - truth).square().mean().sqrt())
    assert row.endpoint_rms == pytest.approx(expected, rel=1e-6)


def test_distances_reach_the_floor_with_steps_and_not_before(rows, target):
    for name in ("heun", "ddim", "ancestral"):
        few, *_, many = of(rows, name)
        for key, floor in target.floor.items():
            assert getattr(many, key) < 1.5 * floor
            if key != "mean_error":
                assert getattr(few, key) > 1.5 * floor


def test_moment_errors_are_exact():
    mean = torch.tensor([0.0, 5.0], dtype=torch.float64)
    covariance = torch.eye(2, dtype=torch.float64)
    x = torch.tensor([[3.0, 4.0], [1.0, 4.0], [2.0, 4.0]], dtype=torch.float64)  # var 1 and 0
    found = moment_errors(x, (mean, covariance))
    assert found["mean_error"] == pytest.approx(math.sqrt((4 + 1) / 2))
    assert found["covariance_error"] == pytest.approx(1 / math.sqrt(2))


def test_every_solver_starts_from_the_same_noise_and_batches_do_not_show(target):
    starts = []

    class Watching:
        sde, shape = sd.VP(), (2,)
        device, dtype = torch.device("cpu"), torch.float64

        def __call__(self, x, t, shift=None):
            if float(t) == self.sde.t_max:
                starts.append(x.clone())
            assert shift is None or len(shift) == len(x)
            return LAW.score(self.sde)(x, t)

    settings = {"solvers": ["heun", "ancestral", TOGETHER], "steps": [3], "samples": 40, "seed": 5}
    whole = compare(Watching(), target, **settings)
    assert len({tuple(x.flatten().tolist()) for x in starts}) == 1
    parts = compare(Watching(), target, batch=16, shift=torch.zeros(40), **settings)
    for a, b in zip(whole[:2], parts[:2], strict=True):
        assert a.nfe == b.nfe
        assert a.sliced_w2 == pytest.approx(b.sliced_w2, rel=1e-9)
    assert compare(Watching(), target, **settings | {"seed": 6})[0].sliced_w2 != whole[0].sliced_w2


def test_a_failure_stays_in_its_row(target):
    class Brittle:
        sde, shape = sd.VP(), (2,)
        device, dtype = torch.device("cpu"), torch.float64

        def __call__(self, x, t):
            if bool(((t > 0.2) & (t < 0.3)).any()):
                raise ValueError("no score\n here")
            return LAW.score(self.sde)(x, t)

    wanted = ["ode", ODE(max_nfe=10), DDIM(eta=0.5)]
    broken, short, fine = compare(Brittle(), target, solvers=wanted, steps=[1], samples=20)
    assert broken.message == "no score here"
    assert not broken.converged
    assert broken.nfe is None
    assert short.solver == "ode(max_nfe=10)"
    assert not short.converged
    assert "stopped after 10 evaluations" in short.message
    assert short.nfe == 11
    assert fine.solver == "ddim(eta=0.5)"
    assert fine.converged
    text = table([broken, short, fine], target.floor)
    assert "failed: no score here" in text
    assert "not converged: sample 0: stopped after" in text


def test_a_state_that_blows_up_has_no_distances(target):
    class Wild:
        sde, shape = sd.VP(), (2,)
        device, dtype = torch.device("cpu"), torch.float64

        def __call__(self, x, t):
            return x * math.inf

    (row,) = compare(Wild(), target, solvers=["ancestral"], steps=[3], samples=20)
    assert not row.converged
    assert "non-finite" in row.message
    assert row.sliced_w2 is None
    assert row.nfe == 4


def test_a_warning_of_the_sampler_goes_into_the_row(target):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (row,) = compare(LAW.score(sd.VE()), target, solvers=["heun"], steps=[5], samples=20,
                         grid="uniform")  # fmt: skip
    assert row.converged
    assert "uniform" in row.message


def test_times_are_the_median_of_all_runs_but_the_first(target, monkeypatch):
    from scoresde.bench import run

    seconds = iter([1e9, 500.0, 3.0, 1.0, 2.0])  # warm-up, then four repeats
    real = run.sample
    monkeypatch.setattr(
        run, "sample",
        lambda *a, **k: run.replace(real(*a, **k), seconds=next(seconds)),
    )  # fmt: skip
    score = LAW.score(sd.VP())
    (row,) = compare(score, target, solvers=["ddim"], steps=[2], samples=20, repeats=4)
    assert (row.seconds, row.seconds_low, row.seconds_high) == (2.0, 1.0, 3.0)


def test_target_of_data_separates_reference_and_floor():
    items = torch.arange(40.0)[:, None]
    halved = Target.of_data(items, samples=100, seed=1)
    assert halved.about["reference_items"] == halved.about["floor_items"] == 20
    both = Target.of_data(items, items + 100, samples=15, seed=1)
    assert sorted(both.reference[:, 0].tolist()) == list(range(40))
    assert both.about["floor_items"] == 15
    assert both.floor["sliced_w2"] > 5 * halved.floor["sliced_w2"]
    # The floor is about real items: real ones pass it.
    real = Target.of_data(LAW.sample(400, torch.Generator().manual_seed(1)), samples=200)
    fresh = real.measure(LAW.sample(200, torch.Generator().manual_seed(2)))
    assert fresh["sliced_w2"] < 1.5 * real.floor["sliced_w2"]
    with pytest.raises(ValueError, match="at least 4 held-out items"):
        Target.of_data(items[:3], samples=10)


def test_target_decodes_before_it_measures():
    items = torch.randint(0, 10, (50, 2), generator=torch.Generator().manual_seed(0))
    target = Target.of_data(items, items, samples=50, decode=lambda z: z * 10)
    assert target.measure(items / 10)["sliced_w2"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_mixture_is_centred_and_scaled(dim):
    mean, covariance = mixture(dim).moments()
    assert mean.abs().max() < 1e-12
    assert float(covariance.trace()) == pytest.approx(dim)


def test_mistakes_are_refused_before_any_work(target):
    score = LAW.score(sd.VP())
    for settings, said in (
        ({"solvers": ["huen"]}, "did you mean 'heun'"),
        ({"grid": "karas"}, "did you mean 'karras'"),
        ({"steps": [0]}, "at least 1"),
        ({"steps": []}, "at least one"),
        ({"samples": 1}, "samples >= 2"),
        ({"repeats": 0}, "repeats >= 1"),
        ({"endpoint": "ancestral"}, "solver of the ODE"),
        ({"endpoint": ODE(max_nfe=5)}, "did not converge"),
    ):
        with pytest.raises(ValueError, match=said):
            compare(score, target, **{"solvers": ["ddim"], "samples": 10, **settings})


def test_labels_name_what_was_changed():
    assert label(PC()) == "pc"
    assert label(PC(corrector=Langevin(snr=0.2))) == "pc(corrector=langevin(snr=0.2))"
    assert label(ODE(rtol=1e-3, method="bosh3")) == "ode(method=bosh3, rtol=0.001)"


def test_verdict_takes_the_cheapest_row_at_the_floor():
    floor = {"sliced_w2": 1.0, "mmd2": 0.1}
    rows = [
        Row("a", 5, nfe=6, sliced_w2=0.9, mmd2=0.2, converged=True),
        Row("b", 10, nfe=21, sliced_w2=0.9, mmd2=-0.2, converged=True),
        Row("c", 10, nfe=11, sliced_w2=1.0, mmd2=0.1, converged=True),
        Row("d", 5, nfe=7, sliced_w2=0.1, mmd2=0.0, converged=False),
    ]
    assert "c, 10 steps, NFE 11" in verdict(rows, floor)
    assert "no row" in verdict(rows[:1], floor)
    marks = table(rows, floor).splitlines()[2:6]
    assert [line.count("*") for line in marks] == [1, 2, 2, 2]


REPEATS = {
    "solvers": ["heun", "ddim", "ancestral"], "steps": [5, 20], "samples": 150,
    "endpoint": sd.solvers.RungeKutta(method="dop853", rtol=1e-5, atol=1e-5),
}  # fmt: skip


@pytest.fixture(scope="module")
def repeated(target):
    return compare(LAW.score(sd.VP()), target, repeats=3, seed=7, **REPEATS)


def test_repeats_are_runs_with_the_next_seeds_and_rows_their_means(repeated, target):
    alone = [compare(LAW.score(sd.VP()), target, seed=seed, **REPEATS) for seed in (7, 8, 9)]
    for i, row in enumerate(repeated):
        assert row.repeats == 3
        for measure in MEASURES:
            values = [getattr(rows[i], measure.key) for rows in alone]
            if values[0] is None:
                assert measure.key not in row.runs
                continue
            assert row.runs[measure.key] == pytest.approx(values, rel=1e-9)
            assert len(set(values)) == 3
            low, high = row.intervals[measure.key]
            assert low <= getattr(row, measure.key) <= high
            assert getattr(row, measure.key) == pytest.approx(sum(values) / 3)
            assert measure.signed or low >= 0
    assert {m for row in alone[0] for m in row.intervals} == {
        "endpoint_rms", "endpoint_median", "endpoint_q95", "mmd2",
    }  # fmt: skip


def test_endpoint_quantiles_are_over_samples(target):
    score, seed = LAW.score(sd.VP()), 3
    (row,) = compare(score, target, solvers=["heun"], steps=[6], samples=200, seed=seed,
                     endpoint=TIGHT)  # fmt: skip
    x_T = sd.VP().prior_sample((200, 2), KeyedNoise(seed), dtype=torch.float64)
    found, exact = (sd.sample(score, x_T=x_T, solver=s, steps=n).x
                    for s, n in (("heun", 6), (TIGHT, None)))  # fmt: skip
    distances = (found - exact).square().mean(1).sqrt()
    assert row.endpoint_median == pytest.approx(float(distances.median()), rel=0.05)
    assert row.endpoint_q95 == pytest.approx(float(distances.quantile(0.95)), rel=1e-6)
    assert row.endpoint_rms == pytest.approx(float(distances.square().mean().sqrt()), rel=1e-6)
    for key in ("endpoint_rms", "endpoint_median", "endpoint_q95"):
        low, high = row.intervals[key]
        assert low < getattr(row, key) < high


def test_the_error_of_the_reference_is_that_of_looser_tolerances(target):
    """Known by a third, much tighter solution: the true error is below what is said."""
    score = LAW.score(sd.VP())
    loose = sd.solvers.RungeKutta(rtol=1e-5, atol=1e-5)
    (row,) = compare(score, target, solvers=["heun"], steps=[400], samples=100, endpoint=loose)
    x_T = sd.VP().prior_sample((100, 2), KeyedNoise(0), dtype=torch.float64)
    ends = [sd.sample(score, x_T=x_T, solver=s).x for s in (loose, TIGHT)]
    true = float((ends[0] - ends[1]).square().mean().sqrt())
    assert true < row.reference_error < 100 * true
    assert doubtful(row, "endpoint_rms")
    assert not doubtful(row, "sliced_w2")
    (tight,) = compare(score, target, solvers=["heun"], steps=[20], samples=100, endpoint=True)
    assert tight.reference_error < 1e-9
    assert not doubtful(tight, "endpoint_rms")
    assert "~" in table([row], {})
    assert "~" not in table([tight], {})
    assert "reference error" in report([row], {})


def test_the_ratio_to_the_best_is_paired_and_among_rows_that_cost_no_more():
    def row(name, nfe, errors, **more):
        mean = sum(errors) / len(errors)
        return Row(name, 5, nfe=nfe, endpoint_rms=mean, runs={"endpoint_rms": errors},
                   repeats=len(errors), converged=True, **more)  # fmt: skip

    rows = [
        row("cheap", 10, (1.0, 10.0)),
        row("twice", 11, (2.0, 20.0)),
        row("best", 20, (0.1, 0.2)),
        row("elsewhere", 5, (1e-9, 1e-9), law="other"),
    ]
    found = against_best(rows)
    assert [r.vs_best for r in found] == pytest.approx([1, 2, 1, 1])
    assert found[1].intervals["vs_best"] == pytest.approx((2, 2))  # the noise is shared
    assert "vs_best" not in found[0].intervals


def test_no_row_is_better_than_the_best():
    """The best has the least geometric mean, as the ratio is one."""
    one = Row("one", 5, nfe=10, endpoint_rms=5.05, runs={"endpoint_rms": (0.1, 10.0)},
              repeats=2, converged=True)  # fmt: skip
    even = Row("even", 5, nfe=10, endpoint_rms=2.0, runs={"endpoint_rms": (2.0, 2.0)},
               repeats=2, converged=True)  # fmt: skip
    assert [r.vs_best for r in against_best([one, even])] == pytest.approx([1, 2])


def test_rows_of_several_grids(target):
    rows = compare(LAW.score(sd.VE(sigma_max=20.0)), target, solvers=["heun", "runge-kutta"],
                   steps=[8], samples=50,
                   grids=[{"name": "karras", "rho": 3}, "uniform"])  # fmt: skip
    assert [r.grid for r in rows] == ["karras(rho=3)", "uniform", None]
    assert {r.sde for r in rows} == {"ve(sigma_max=20)"}
    assert rows[0].sliced_w2 != rows[1].sliced_w2
    assert rows[2].nfe_max >= rows[2].nfe > 0


def test_rows_are_told_as_they_are_done(target):
    told = []

    def stop(row):
        told.append(row)
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(LAW.score(sd.VP()), target, solvers=["ddim"], steps=[1, 2, 3], samples=20,
                on_row=stop)  # fmt: skip
    assert [row.steps for row in told] == [1, 2]


def test_a_user_solver_may_fail_in_any_way(target, monkeypatch):
    def step(*arguments):
        raise AttributeError("no such thing")

    monkeypatch.setattr(sd.solvers.Heun, "step", step)
    failed, fine = compare(LAW.score(sd.VP()), target, solvers=["heun", "ddim"], steps=[3],
                           samples=20)  # fmt: skip
    assert failed.message == "AttributeError: no such thing"
    assert fine.converged
