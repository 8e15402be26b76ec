"""Explicit Runge-Kutta methods: their tableaus, their orders, and what a user may bring."""

import pytest
import torch

import scoresde as sd
from scoresde import config, grids, solvers
from scoresde.bench.convergence import flow, order, trajectory_error
from scoresde.noise import KeyedNoise
from scoresde.solvers.multistep import VARIABLES, Multistep, level
from scoresde.solvers.tableau import TABLEAUS, logsnr_at, order_of, tableau, trees

f64 = torch.float64
DECLARED = {
    "euler": (1, 1), "midpoint": (2, 2), "heun2": (2, 2), "ralston2": (2, 2), "kutta3": (3, 3),
    "heun3": (3, 3), "ralston3": (3, 3), "ssprk3": (3, 3), "rk4": (4, 4), "rk38": (4, 4),
    "ralston4": (4, 4), "dopri5": (5, 6),
}  # fmt: skip
"""Order and evaluations a step."""
KUTTA = ([[0.5], [-1, 2]], [1 / 6, 2 / 3, 1 / 6], [0, 0.5, 1])


@pytest.fixture(scope="module")
def references():
    return {}


def measured(solver, sde, mixture, references, steps):
    """Slope of the error of the trajectory, from ``steps`` to twice as many."""
    score, start, end = mixture.score(sde), sde.t_max, sde.t_min_sampling
    x = sde.prior_sample((8, 2), KeyedNoise(1), dtype=f64)
    if sde not in references:
        references[sde] = flow(score, x, start, end, 1e-13)
    times = (grids.LogSNR()(sde, n, start, end) for n in (steps, 2 * steps))
    return order(*(trajectory_error(solver, score, x, t, references[sde]) for t in times))


@pytest.mark.parametrize(
    ("method", "variable", "steps"),
    [("heun2", "velocity", 100), ("ralston3", "velocity", 100), ("rk4", "velocity", 60),
     ("dopri5", "noise", 150)],
)  # fmt: skip
def test_order_of_the_trajectory(sde, mixture, references, method, variable, steps):
    solver = solvers.ExplicitRK(method, variable)
    found = measured(solver, sde, mixture, references, steps)
    assert found == pytest.approx(DECLARED[method][0], abs=0.1)


@pytest.mark.parametrize("method", sorted({*TABLEAUS} - {"heun2", "ralston3", "dopri5"}))
def test_order_of_the_other_methods(mixture, references, method):
    """In the noise, where the errors' leading terms show at fewer steps."""
    solver = solvers.ExplicitRK(method, "noise")
    found = measured(solver, sd.VP(), mixture, references, 60)
    assert found == pytest.approx(DECLARED[method][0], abs=0.1)


@pytest.mark.parametrize("variable", VARIABLES)
def test_each_variable_has_the_order_of_the_tableau(mixture, references, variable):
    found = measured(solvers.ExplicitRK("rk4", variable), sd.VP(), mixture, references, 80)
    assert found == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("method", list(TABLEAUS))
def test_tableaus_are_consistent_and_of_their_order(method):
    found = TABLEAUS[method]
    assert tableau(found) == found
    assert (order_of(found), len(found.b)) == DECLARED[method]
    solver = solvers.ExplicitRK(method)
    assert (solver.order, solver.nfe_per_step) == DECLARED[method]


def test_rooted_trees():
    assert [len(trees(n)) for n in range(1, 8)] == [1, 1, 2, 4, 9, 20, 48]
    assert len(set(trees(7))) == 48


def test_one_coefficient_that_is_off_costs_order():
    a, b, c = TABLEAUS["rk4"]
    assert order_of(tableau((a, (1 / 6, 1 / 2, 1 / 6, 1 / 6), c))) == 2
    assert order_of(tableau(((*a[:2], (0.5, 0, 0.5)), b, c))) == 2


@pytest.mark.parametrize("variable", VARIABLES)
def test_kappa_and_its_inverse(sde, variable):
    rule = Multistep(variable)
    logsnr = level(sde, torch.tensor(0.3 * sde.t_max, dtype=f64)).logsnr
    torch.testing.assert_close(logsnr_at(rule, rule.kappa(logsnr)), logsnr)


def test_two_stages_in_the_noise_are_heun(sde, mixture):
    """rhoRK of DEIS, of which rhoHeun is EDM's sampler."""
    score = mixture.score(sde)
    settings = {"steps": 9, "grid": "karras", "dtype": f64}
    ours = sd.sample(score, (3, 2), solver=solvers.ExplicitRK("heun2", "noise"), **settings)
    heun = sd.sample(score, (3, 2), solver="heun", **settings)
    torch.testing.assert_close(ours.x, heun.x, rtol=1e-9, atol=1e-9)
    assert ours.nfe == heun.nfe == 19


@pytest.mark.parametrize("variable", VARIABLES)
def test_one_stage_is_the_multistep_method_of_one_point(sde, mixture, variable):
    score = mixture.score(sde)
    pair = (solvers.ExplicitRK("euler", variable), solvers.Multistep(variable, points=1))
    x = [sd.sample(score, (3, 2), solver=s, steps=9, dtype=f64).x for s in pair]
    torch.testing.assert_close(*x, rtol=1e-9, atol=1e-9)


def test_a_tableau_of_the_user(mixture):
    own = config.build({"name": "rk", "method": KUTTA}, solvers, "solver")
    assert (own.order, own.nfe_per_step) == (3, 3)
    x = [sd.sample(mixture.score(sd.VP()), (3, 2), solver=s, steps=5).x
         for s in (own, solvers.ExplicitRK("kutta3"))]  # fmt: skip
    torch.testing.assert_close(*x)
    assert config.build(config.describe(own), solvers, "solver") == own


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "rk5"}, "unknown method of ExplicitRK 'rk5'.*did you mean 'rk"),
        ({"variable": "x0"}, "unknown variable 'x0'.*velocity"),
        ({"method": 3}, r"a tableau is \(a, b, c\), three lists of numbers, got 3"),
        ({"method": ([[1]], [1])}, r"a tableau is \(a, b, c\)"),
        ({"method": ([[0, 0], [1, 0]], [0.5, 0.5], [0, 1])}, r"1 to 1 num.* rows of \[2, 2\]"),
        ({"method": ([[1]], [0.5, 0.5], [0])}, "2 places c, got rows .* and 1 places"),
        ({"method": ([[0.9]], [0.5, 0.5], [0, 1])}, r"row 1 .* sum to c\[1\]=1.0: 0.9"),
        ({"method": ([[1]], [0.5, 0.6], [0, 1])}, "weights b .* sum to 1, got 1.1"),
        ({"method": ([[2]], [0.75, 0.25], [0, 2])}, r"lie in \[0, 1\], got c\[1\]=2.0"),
    ],
)  # fmt: skip
def test_what_is_refused(fields, message):
    with pytest.raises(sd.ConfigError, match=message):
        config.build({"name": "rk", **fields}, solvers, "solver")
