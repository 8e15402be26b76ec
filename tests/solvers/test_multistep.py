"""Multistep and singlestep exponential integrators: their weights, and diffusers' numbers."""

from itertools import pairwise

import pytest
import torch

import scoresde as sd
from scoresde import solvers
from scoresde.config import build
from scoresde.noise import KeyedNoise
from scoresde.solvers.multistep import COORDINATES, VARIABLES, level, ratio

diffusers = pytest.importorskip("diffusers")
f64 = torch.float64


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("coordinate", COORDINATES)
def test_polynomials_are_integrated_exactly(sde, variable, coordinate):
    """Against the trapezoid rule in kappa itself, for the value of a cubic."""
    rule = solvers.Multistep(variable, points=4, coordinate=coordinate)
    fractions = torch.tensor([0.65, 0.7, 0.78, 0.85], dtype=f64) * sde.t_max
    levels = tuple(level(sde, t) for t in fractions)
    start, end = levels[0], level(sde, fractions[0] * 0.9)

    def cubic(logsnr, t):
        c = rule.place(logsnr, t) / rule.place(start.logsnr, start.t)
        return 1 + 2 * c - c**2 + 0.5 * c**3

    weights = rule.weights(levels, start, end, sde)
    found = sum(w * cubic(at.logsnr, at.t) for w, at in zip(weights, levels, strict=True))

    logsnr = torch.linspace(float(start.logsnr), float(end.logsnr), 4001, dtype=f64)
    q = torch.exp(-logsnr)
    kappa, m = {
        "noise": (q, end.alpha),
        "data": (1 / q, end.sigma),
        "velocity": (torch.atan(q), torch.hypot(end.alpha, end.sigma)),
    }[variable]
    expected = m * torch.trapezoid(cubic(logsnr, sde.time(logsnr)), kappa)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("variable", VARIABLES)
def test_each_variable_is_the_ode(sde, mixture, variable):
    """``d(x/m)/d kappa = V`` along the probability flow, by a central difference."""
    score, t = (
        mixture.score(sde),
        torch.tensor(0.4005 * sde.t_max, dtype=f64),
    )  # within a step of DDPM's table
    x = KeyedNoise(0).normal((3, 2), dtype=f64)
    rule, reverse = solvers.Multistep(variable), sde.reverse(score, eta=0.0)
    h, here = 1e-5 * sde.t_max, level(sde, t)

    def u(sign):
        moved = x + sign * h * reverse.drift(x, t)
        at = level(sde, t + sign * h)
        return moved / ratio(variable, here, at), rule.kappa(at.logsnr)

    (ahead, k1), (behind, k0) = u(1), u(-1)
    slope = (ahead - behind) / (k1 - k0)
    m = {"noise": here.alpha, "data": here.sigma, "velocity": torch.hypot(here.alpha, here.sigma)}
    value = m[variable] * rule.value(reverse, x, here)
    torch.testing.assert_close(slope, value, rtol=1e-4, atol=1e-4)


def eps_hat(x, t):
    return torch.tanh(x * (1 + t)) * 0.7 + 0.1 * torch.sin(3 * t) * x


@pytest.mark.parametrize(
    ("scheduler", "options", "solver"),
    [
        ("DPMSolverMultistep", {"solver_order": 2}, solvers.DPMpp2M()),
        ("DPMSolverMultistep", {"solver_order": 3}, solvers.DPMpp3M(form="published")),
        ("UniPCMultistep", {"solver_order": 1, "solver_type": "bh1"}, solvers.UniPC(points=1)),
        (
            "UniPCMultistep",
            {"solver_order": 2, "solver_type": "bh2"},
            solvers.UniPC(points=2, line="bh2"),
        ),
        ("UniPCMultistep", {"solver_order": 3, "solver_type": "bh1"}, solvers.UniPC()),
        (
            "DEISMultistep",
            {"solver_order": 3},
            solvers.DEIS(points=3, coordinate="logsnr"),
        ),
    ],
    ids=repr,
)
def test_steps_are_those_of_diffusers(scheduler, options, solver):
    if scheduler != "DEISMultistep":
        options = {**options, "final_sigmas_type": "sigma_min"}
    theirs = getattr(diffusers, scheduler + "Scheduler")(
        num_train_timesteps=1000,
        beta_schedule="linear",
        timestep_spacing="linspace",
        lower_order_final=False,
        **options,
    )
    theirs.set_timesteps(12)
    x = expected = KeyedNoise(0).normal((4, 3), dtype=f64)
    for t in theirs.timesteps:
        expected = theirs.step(eps_hat(expected, (t + 1.0) / 1000), t, expected).prev_sample
    sde = sd.DDPM()

    def score(x, t):
        return -eps_hat(x, t) / sde.sigma(t)

    score.sde = sde
    times = sde.time(-theirs.sigmas.double().log())
    found = solver.integrate(solver.reverse(score), x, times).x
    # Their noise levels are rounded to float32, which the time of 1e-7 of a step shows.
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-4)


def test_the_third_order_method_beats_its_published_form(mixture):
    score = mixture.score(sd.VP())
    x_T = KeyedNoise(1).normal((32, 2), dtype=f64)
    settings = {"x_T": x_T, "denoise": False, "grid": "logsnr"}
    tight = solvers.RungeKutta("dop853", rtol=1e-10, atol=1e-10, max_nfe=10**5)
    truth = sd.sample(score, x_T=x_T, solver=tight, denoise=False).x
    errors = [
        (sd.sample(score, solver=solvers.DPMpp3M(form=form), steps=100, **settings).x - truth)
        .square()
        .mean()
        .sqrt()
        for form in ("exact", "published")
    ]
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("sa", "variable"),
        ("sde-dpmpp-2m", "variable"),
        ("unipc", "corrector"),
        ("dpmpp-3m", "points"),
        ("lms", "coordinate"),
    ],
)
def test_what_defines_a_method_cannot_be_set(name, key):
    value = {"variable": "noise", "coordinate": "t"}.get(key, 2)
    with pytest.raises(sd.ConfigError, match=f"unknown key solver.{key} of"):
        build({"name": name, key: value}, solvers, "solver")


def test_fewer_points_at_the_end(mixture):
    """With ``lower_last`` the last step is DDIM's, with one value."""
    score, times = mixture.score(sd.VP()), torch.tensor([0.9, 0.6, 0.4, 0.2], dtype=f64)
    x = KeyedNoise(1).normal((5, 2), dtype=f64)
    solver = solvers.Multistep("data", points=3, lower_last=True)
    reverse, state = solver.reverse(score), solver.init(None, x, times, None)
    for t, s in pairwise(times):
        before = x
        x, state = solver.step(reverse, x, t, s, None, state)
    ddim, _ = solvers.DDIM().step(solvers.DDIM().reverse(score), before, t, s, None)
    torch.testing.assert_close(x, ddim, rtol=1e-10, atol=1e-10)


def test_edm_without_churn_is_heun(sde, mixture):
    score = mixture.score(sde)
    x = [sd.sample(score, (3, 2), solver=name, steps=7).x for name in ("edm", "heun")]
    assert torch.equal(*x)


def test_noise_between_two_levels_only(mixture):
    score, solver = mixture.score(sd.VP()), solvers.SASolver()
    a = sd.sample(score, (4, 2), solver=solver, steps=12, seed=1)
    x_T = KeyedNoise(1).normal((4, 2), dtype=f64)
    quiet = solvers.SASolver(strength=0.0)
    ode = solvers.Multistep("data", points=3, corrector=4)
    found, plain = (sd.sample(score, x_T=x_T, solver=s, steps=12, seed=1).x for s in (quiet, ode))
    assert torch.equal(found, plain)
    assert (a.x - found).abs().max() > 1e-3
    here, ahead = (level(sd.VP(), torch.tensor(t, dtype=f64)) for t in (0.5, 0.4))
    assert solver.tau(here, ahead) == 1
    assert solver.tau(ahead, level(sd.VP(), torch.tensor(0.1, dtype=f64))) == 0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: solvers.Multistep(variable="nois"), "unknown variable 'nois'.*noise"),
        (lambda: solvers.Multistep(coordinate="log"), "unknown coordinate"),
        (lambda: solvers.Multistep(points=7), "1 to 6 points, got 7"),
        (lambda: solvers.Multistep(corrector=1), "corrector of 0 or 2 to 7, got 1"),
        (lambda: solvers.DPMpp3M(form="third"), "unknown form 'third'"),
        (lambda: solvers.UniPC(line="bh3"), "unknown line 'bh3'.*bh1"),
        (lambda: solvers.SDEDPMpp2M(points=3), "1 or 2 points, got 3"),
        (lambda: solvers.PNDM(points=5), "1 to 4 points, got 5"),
        (lambda: solvers.EDM(churn=-1.0), "churn >= 0"),
        (lambda: solvers.SASolver(strength=-1.0), "strength >= 0, got -1"),
    ],
)
def test_refusals(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(("steps", "points"), [(2, 1), (5, 1), (6, 2), (9, 2), (10, 3), (40, 3)])
def test_vabm_looks_back_as_far_as_its_steps_bear(mixture, steps, points):
    score, settings = mixture.score(sd.VP()), {"steps": steps, "grid": "logsnr", "denoise": False}
    x = sd.sample(score, (3, 2), solver="vabm", **settings).x
    for k in (1, 2, 3):
        same = torch.equal(x, sd.sample(score, (3, 2), solver=solvers.VABM(k), **settings).x)
        # Two steps know of no more than two values, which all of them pass through.
        assert same == (k == points) or steps <= k
    both = solvers.Parallel("vabm", window=steps, tolerance=0.0)
    found = sd.sample(score, (3, 2), solver=both, **settings).x
    torch.testing.assert_close(found, x, rtol=1e-6, atol=1e-6)
