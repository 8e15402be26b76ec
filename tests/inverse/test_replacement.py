"""Replacement: laws of the state at every level, the end, and what goes in and comes out."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from keeping import (
    LAWS,
    POINT,
    close_to,
    follows_the_law,
    measured,
    nothing,
    point,
    turned,
)

import scoresde as sd
from scoresde.config import ConfigError
from scoresde.inverse import operators as room
from scoresde.inverse.known import Known, Level
from scoresde.inverse.replacement import Replacement
from scoresde.noise import KeyedNoise
from scoresde.solvers import Ancestral

D = torch.float64
MASK = room.Mask(torch.tensor([True, False]))


@pytest.mark.parametrize("name", list(LAWS))
@pytest.mark.parametrize("noise_std", [0.0, 0.6])
def test_state_at_every_level_has_the_law_of_the_process_given_y_and_the_data(name, noise_std):
    sde, (operator, _, y), seen = LAWS[name](), measured(noise_std), []

    def check(step, t, x):
        seen.append(follows_the_law(sde, t, x, noise_std))

    solver = Replacement(operator, y, noise_std, "ancestral")
    sd.sample(point(sde), (8000, 4), solver=solver, steps=9, seed=1, callback=check, dtype=D)
    assert len(seen) == 9
    if noise_std:  # levels above, between and below those of the measurements have been met
        assert {sum(row) for row in seen} >= {0, 3}


def test_posterior_of_a_gaussian_is_met():
    operator, v = turned()
    spread, noise_std = 0.8, 0.4
    score = sd.GaussianMixture([1.0], POINT, [spread]).score(sd.VP())
    y = torch.tensor([[1.5, -0.3, 0.6, 0.2]], dtype=D)
    solver = Replacement(operator, y, noise_std, "sde-dpmpp-2m")
    x = sd.sample(score, (4000, 4), solver=solver, steps=100, seed=2, dtype=D).x
    posterior = score.mixture.posterior(operator, y, noise_std)
    mean, covariance = posterior.moments()
    c = x @ v
    want, std = mean @ v, (v.T @ covariance @ v).diagonal().sqrt()
    assert bool(((c.mean(0) - want).abs() < 0.05 * std + 4.5 * std / 4000**0.5).all())
    assert torch.allclose(c.std(0), std, rtol=0.05)


def test_known_part_is_noised_before_the_first_evaluation():
    sde, states = sd.VE(sigma_max=5.0), []
    exact = point(sde, POINT[:, :2])

    class Watched(sd.analytic.MixtureScore):
        def __call__(self, x, t):
            states.append(x.clone())
            return super().__call__(x, t)

    y = torch.tensor([[100.0, 0.0]], dtype=D)
    solver = Replacement(MASK, y, 3.0, "ancestral")
    sd.sample(Watched(exact.mixture, sde), (5000, 2), solver=solver, steps=2, seed=0, dtype=D)
    std = torch.tensor([4.0, 5.0], dtype=D)  # sqrt(5^2 - 3^2)
    close_to(states[0], y[0], std)


def test_a_measurement_worse_than_the_prior_is_told_by_its_share():
    known = Known.of(MASK, torch.tensor([[10.0, 0.0]], dtype=D), 8.0, POINT[:, :2])
    at = Level(torch.tensor(0.5).double(), torch.tensor(2.0).double())  # q = 4, half of tau
    c = 2.0 * torch.randn(200000, 2, generator=torch.Generator().manual_seed(0)).double()
    z = torch.randn(200000, 2, generator=torch.Generator().manual_seed(1)).double()
    told = known.start(c, at, z)
    close_to(told, torch.tensor([0.5 * 10 / 4, 0.0]), torch.tensor([(4 * 0.75) ** 0.5, 2.0]))
    assert torch.equal(told[:, 1], c[:, 1])


def test_the_end_is_y_where_known_and_denoised_elsewhere(sde, mixture):
    score, last = mixture.score(sde), []
    y = torch.tensor([[0.3, 0.0]], dtype=D)
    out = sd.sample(
        score, (6, 2), solver=Replacement(MASK, y), steps=12, dtype=D, t_end=0.05,
        callback=lambda i, t, x: last.append((t, x.clone())),
    )  # fmt: skip
    t, x = last[-1]
    want = score.denoise(x, t)[:, 1]
    assert torch.equal(out.x[:, 0], y[0, 0].expand(6))
    torch.testing.assert_close(out.x[:, 1], want, rtol=1e-9, atol=1e-12)
    assert bool(((want - x[:, 1] / sde.alpha(t)).abs() > 1e-6).all())
    assert out.nfe == 13
    assert out.denoised
    kept = sd.sample(
        score, (6, 2), solver=Replacement(MASK, y), steps=12, dtype=D, t_end=0.05, denoise=False
    )
    assert torch.equal(kept.x, x)
    assert kept.nfe == 12


def test_noise_of_the_measurement_is_taken_away_at_the_end():
    spread, mu, m, q = 0.5, 0.2, 1.0, 0.3
    at = Level(torch.tensor(0.8, dtype=D), torch.tensor(0.8 * q, dtype=D))

    def settled(tau, u):
        known = Known.of(MASK, torch.tensor([[m, 0.0]], dtype=D), tau, POINT[:, :2])
        denoised = (spread**2 * u + q**2 * mu) / (spread**2 + q**2)
        c, x0 = (torch.tensor([pair], dtype=D) for pair in ((0.8 * u, 3.0), (denoised, 7.0)))
        out = known.settle(c, x0, at)
        assert out[0, 1] == 7.0
        return float(out[0, 0])

    def mean(tau):
        return (spread**2 * m + tau**2 * mu) / (spread**2 + tau**2)

    assert settled(0.0, 1.1) == m
    assert settled(q, m) == pytest.approx(mean(q), rel=1e-6)
    assert settled(q * 1.0001, m) == pytest.approx(mean(q), rel=1e-3)
    assert settled(0.1, m) == pytest.approx(mean(0.1), abs=0.01)
    assert settled(0.1, m) != pytest.approx(m, abs=0.01)
    # Far below the noise of the measurement, the state has moved away from it.
    assert settled(0.9, 0.25) == pytest.approx((spread**2 * 0.25 + q**2 * mu) / 0.34, rel=1e-9)


@pytest.mark.parametrize("name", ["ddim", "heun", "vabm", "unipc", "dpmpp-2m"])
def test_without_anything_measured_it_is_the_solver_inside(name, mixture):
    score = mixture.score(sd.VP())
    kept = Replacement(nothing(), torch.zeros(1, 1, dtype=D), 0.0, name)
    ours = sd.sample(score, (5, 2), solver=kept, steps=8, dtype=D)
    own = sd.sample(score, (5, 2), solver=name, steps=8, dtype=D)
    torch.testing.assert_close(ours.x, own.x, rtol=1e-12, atol=1e-12)
    assert ours.nfe == own.nfe


@dataclass(frozen=True, eq=False)
class Telling(Ancestral):
    """Steps that keep account of what was added to the state between them."""

    def init(self, reverse, x, times, noise):
        return x

    def shifted(self, state, change):
        return state + change

    def step(self, reverse, x, t, s, noise, state=None):
        torch.testing.assert_close(state, x, rtol=1e-12, atol=1e-12)
        moved, _ = super().step(reverse, x, t, s, noise)
        return moved, moved


def test_the_solver_inside_is_told_of_every_change(mixture):
    operator = room.Linear(torch.tensor([[1.0, 0.5]]))
    y = torch.tensor([[0.4]], dtype=D)
    sd.sample(
        mixture.score(sd.VP()), (5, 2), solver=Replacement(operator, y, 0.1, Telling()), steps=8,
        dtype=D,
    )  # fmt: skip


def test_a_sample_alone_is_that_of_the_batch(mixture):
    score = mixture.score(sd.VP())
    y = torch.tensor([[0.3, 0.0], [-0.8, 0.0], [1.0, 0.0]], dtype=D)
    both = sd.sample(score, (3, 2), solver=Replacement(MASK, y, 0.2), steps=10, dtype=D).x
    for i in range(3):
        alone = sd.sample(
            score, (1, 2), solver=Replacement(MASK, y[i : i + 1], 0.2), steps=10, dtype=D,
            start_index=i,
        )  # fmt: skip
        torch.testing.assert_close(alone.x[0], both[i], rtol=1e-12, atol=1e-12)
    one = sd.sample(score, (3, 2), solver=Replacement(MASK, y[:1], 0.2), steps=10, dtype=D).x
    torch.testing.assert_close(one[0], both[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(one[1], both[1], atol=0.1)


def test_items_of_any_shape_in_single_precision():
    mixture = sd.GaussianMixture([1.0, 1.0], torch.randn(2, 3, 4, 4), [0.3, 0.4])
    x = mixture.sample(2)
    for operator in (room.AveragePool((3, 4, 4), 2), room.Blur((3, 4, 4), 0.7)):
        y = operator(x)
        out = sd.sample(mixture.score(sd.VP()), (2, 3, 4, 4), solver=Replacement(operator, y),
                        steps=10)  # fmt: skip
        assert out.x.dtype == torch.float32
        assert out.converged
        torch.testing.assert_close(operator(out.x), y, rtol=1e-3, atol=1e-4)


def test_a_brownian_path_is_followed(mixture):
    score = mixture.score(sd.VP())
    y = torch.tensor([[0.3, 0.0]], dtype=D)
    few, many, other = (
        sd.sample(score, (200, 2), solver=Replacement(MASK, y), steps=n, dtype=D, brownian=path).x[
            :, 1
        ]
        for n, path in ((400, True), (401, True), (401, False))
    )
    # The replaced part is noise of its own, so that the paths are alike but not the same.
    assert (few - many).square().mean() < 0.9 * (few - other).square().mean()


def test_what_is_said_of_the_solver_is_plain():
    solver = Replacement(MASK, torch.zeros(1, 2), 0.1, {"name": "ddim", "eta": 0.5})
    out = sd.sample(point(sd.VP(), POINT[:, :2]), (2, 2), solver=solver, steps=3)
    assert json.loads(json.dumps(out.solver)) == {
        "name": "replacement", "operator": "mask", "noise_std": 0.1,
        "solver": {"name": "ddim", "eta": 0.5},
    }  # fmt: skip
    assert solver.eta == 0.5
    assert solver.nfe_per_step == 1
    assert Replacement(MASK, torch.zeros(1, 2), 0.1, "heun").nfe_per_step == 2
    assert Replacement(MASK, torch.zeros(1, 2), 0.1, "edm").default_grid == "karras"
    assert solver != Replacement(MASK, torch.ones(1, 2), 0.1)
    assert solver == solver
    assert sd.bench.row.label(solver)


def test_what_does_not_fit_is_refused_in_one_line(mixture):
    y = torch.zeros(1, 2, dtype=D)
    blind = room.Custom(lambda x: x, (2,))
    for wrong, said in (
        (lambda: Replacement(blind, y), "needs an operator with a spectrum, which Custom has not"),
        (lambda: Replacement(MASK, y, -1.0), "noise_std"),
        (lambda: Replacement(MASK, y, math.nan), "noise_std"),
        (lambda: Replacement(MASK, torch.zeros(1, 3)), "measurements of Mask"),
        (lambda: Replacement(MASK, [0.0, 0.0]), "needs a measurement y"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            wrong()
        assert "\n" not in str(caught.value)
    for solver in ("runge-kutta", "nowhere", 3):
        with pytest.raises(ConfigError):
            Replacement(MASK, y, 0.0, solver)
    with pytest.raises(ValueError, match="2 measurements do not fit 3 samples"):
        sd.sample(mixture.score(sd.VP()), (3, 2), solver=Replacement(MASK, y.expand(2, 2)))
    solver = Replacement(MASK, y)
    reverse = solver.reverse(mixture.score(sd.VP()))
    with pytest.raises(ValueError, match="init"):
        solver.step(reverse, y, torch.tensor(1.0), torch.tensor(0.5), KeyedNoise(0))
