"""Likelihoods by the package's own solvers, on a grid from data to noise."""

import math

import pytest
import torch

import scoresde as sd
from scoresde import grids, solvers
from scoresde.bench.convergence import order
from scoresde.config import ConfigError

f64 = torch.float64
SOLVERS = [
    ("ddim", 1),
    ("heun", 2),
    ("dpmpp-2m", 2),
    ({"name": "unipc", "points": 2}, 3),
    (solvers.VABM(points=2), 3),
    ({"name": "rk", "method": "rk4"}, 4),
]


@pytest.fixture
def data():
    means = torch.tensor([[-0.7, 0.2, 0.1], [0.6, -0.3, 0.0], [0.0, 0.5, -0.4]], dtype=f64)
    return sd.GaussianMixture([0.5, 0.3, 0.2], means, [0.4, 0.5, 0.6])


@pytest.mark.parametrize(("method", "declared"), SOLVERS, ids=str)
def test_the_density_has_the_order_of_the_solver(sde, data, method, declared):
    x = data.sample(8, torch.Generator().manual_seed(0))
    score, settings = data.score(sde), {"divergence": "exact"}
    truth = sd.log_prob(score, x, method="dop853", rtol=1e-11, atol=1e-11, **settings).log_prob
    errors = []
    for steps in (100, 200):
        found = sd.log_prob(score, x, method=method, steps=steps, **settings)
        errors.append(float((found.log_prob - truth).square().mean().sqrt()))
    assert errors[1] < (0.2 if declared == 1 else 0.02)
    assert order(*errors) > declared - 0.1


def test_it_is_the_density_of_the_mixture(sde, data):
    x = data.sample(16, torch.Generator().manual_seed(1))
    mean, covariance = data.moments()
    settings = {"method": {"name": "unipc"}, "steps": 400, "divergence": "exact"}
    found = sd.log_prob(data.score(sde), x, terminal=(mean, covariance.diagonal().sqrt()),
                        **settings)  # fmt: skip
    exact = data.log_prob(x, sde, sde.t_min_likelihood)
    assert torch.allclose(found.log_prob, found.prior + found.delta)
    assert (found.log_prob - exact).abs().max() < 1e-3
    plain = sd.log_prob(data.score(sde), x, **settings)
    assert torch.equal(plain.prior, sde.prior_log_prob(found.latent))
    assert torch.equal(plain.delta, found.delta)
    assert bool(found.converged.all())
    assert found.nfe.tolist() == [401] * 16  # one more at the end, for the quadrature


@pytest.mark.parametrize("noise", ["rademacher", "walsh"])
def test_signs_that_turn_along_the_grid_leave_less_to_the_probes(noise):
    """Still without bias, and with a fraction of the variance of probes that are kept."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(24, 16, generator=generator, dtype=f64)
    cloud = sd.GaussianMixture(torch.ones(24), means, torch.full((24,), 0.6, dtype=f64))
    x, score = means[:3].mean(0).expand(300, 16).clone(), cloud.score(sd.VP())
    settings = {"method": "unipc", "steps": 32, "probes": 2, "noise": noise}
    truth = sd.log_prob(score, x[:1], divergence="exact", method="unipc", steps=32).log_prob
    turning = sd.log_prob(score, x, **settings)
    kept = sd.log_prob(score, x, rtol=1e-3, atol=1e-3, probes=2, noise=noise)
    error = turning.log_prob - truth
    assert abs(error.mean()) < 4 * error.std() / 300**0.5
    assert turning.log_prob.var() < 0.7 * kept.log_prob.var()
    if noise != "walsh":  # whose estimates are no independent ones
        assert turning.stderr.square().mean() == pytest.approx(float(error.var()), rel=0.25)
    assert turning.probes == 2


def test_items_do_not_depend_on_their_batch(data):
    x, score = data.sample(6), data.score(sd.VP())
    settings = {"method": "vabm", "steps": 20, "seed": 2}
    whole = sd.log_prob(score, x, **settings)
    parts = [sd.log_prob(score, x[i : i + 2], start_index=i, **settings) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat([p.log_prob for p in parts]), whole.log_prob)


def test_it_says_how_it_was_obtained(data):
    told = []
    found = sd.log_prob(
        data.score(sd.VP()), data.sample(2), method="vabm", steps=5, grid="karras",
        progress=lambda *what: told.append(what),
    )  # fmt: skip
    assert (found.method, found.steps) == ("vabm", 5)
    assert found.solver == {"name": "vabm", "points": 0, "lower_last": False}
    assert found.grid == {"name": "karras", "rho": 7.0}
    assert [fraction for fraction, *_ in told] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [nfe for *_, nfe in told] == [1, 2, 3, 4, 5]
    times = grids.Karras()(sd.VP(), 5, 1.0, sd.VP().t_min_likelihood).flip(0)
    assert [t for _, t, _ in told] == pytest.approx(times[1:].tolist())
    plain = sd.log_prob(data.score(sd.VP()), data.sample(2))
    assert (plain.method, plain.solver, plain.grid) == ("dopri5", None, None)


def test_an_item_that_is_lost_is_named(data):
    exact = data.score(sd.VP())

    def score(x, t):
        return exact(x, t) * torch.where(x[:, :1] > 3, math.nan, 1.0)

    score.sde = exact.sde
    x = data.sample(3)
    x[1] = 4.0
    found = sd.log_prob(score, x, method="heun", steps=10)
    assert found.converged.tolist() == [True, False, True]
    assert bool(found.log_prob[1].isnan())
    assert "non-finite values from step 1 of 10 on" in found.message
    assert "item 1" in found.message


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "unipc"}, "'unipc' takes fixed steps: give steps >= 1, got None"),
        ({"method": "unipc", "steps": 0}, "steps >= 1, got 0"),
        ({"method": "ancestral", "steps": 9}, "'ancestral', which draws noise or chooses"),
        ({"method": {"name": "ddim", "eta": 1.0}, "steps": 9}, "'ddim', which draws noise"),
        ({"method": "runge-kutta", "steps": 9}, "'runge-kutta', which draws noise or chooses"),
        ({"method": "heun", "steps": 9, "max_nfe": 18}, "take 19 evaluations, more than max_nfe"),
        ({"method": "vamb", "steps": 9}, "unknown method 'vamb'.*did you mean 'vab'"),
        ({"method": "dopri5", "grid": "karras"}, "'dopri5' has steps of its own"),
        ({"method": "vabm", "steps": 9, "grid": "tuned"}, "grids are tuned for sampling"),
        ({"method": "vabm", "steps": 9, "grid": "carras"}, "did you mean 'karras'"),
    ],
)
def test_what_does_not_fit_is_refused(data, settings, match):
    with pytest.raises((ValueError, ConfigError), match=match):
        sd.log_prob(data.score(sd.VP()), data.sample(2), **settings)


def test_a_refined_solve_differs_by_the_steps_alone(data):
    """Its probes turn where those of the unrefined one do, so that most of their noise cancels."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(24, 16, generator=generator, dtype=f64)
    cloud = sd.GaussianMixture(torch.ones(24), means, torch.full((24,), 0.6, dtype=f64))
    x, score = means[:3].mean(0).expand(200, 16).clone(), cloud.score(sd.VP())
    settings = {"method": "unipc", "steps": 16}
    plain = sd.log_prob(score, x, **settings)
    fine = sd.log_prob(score, x, refine=4, **settings)
    other = sd.log_prob(score, x, **{**settings, "steps": 64})
    assert fine.steps == other.steps == 64
    paired = (fine.log_prob - plain.log_prob).var()
    assert paired < 0.3 * (other.log_prob - plain.log_prob).var()
    steps = {
        n: sd.log_prob(score, x[:1], divergence="exact", method="unipc", steps=n).log_prob
        for n in (16, 64)
    }
    error = (fine.log_prob - plain.log_prob) - (steps[64] - steps[16])
    assert abs(error.mean()) < 4 * error.std() / 200**0.5
    tight = sd.log_prob(score, x[:2], refine=4)
    assert (tight.rtol, tight.atol) == pytest.approx((1e-7, 1e-7))
    with pytest.raises(ValueError, match="refine must be at least 1"):
        sd.log_prob(score, x[:2], refine=0)
