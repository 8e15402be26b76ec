"""RePaint: its order of visits, what it costs, and laws of the state on the way up and down."""

import itertools
import json
import math

import pytest
import torch
from keeping import (
    LAWS,
    close_to,
    follows_the_law,
    measured,
    nothing,
    point,
)

import scoresde as sd
from scoresde.inverse import operators as room
from scoresde.inverse.known import Known, Level
from scoresde.inverse.repaint import RePaint
from scoresde.inverse.replacement import Replacement

D = torch.float64
MASK = room.Mask(torch.tensor([True, False]))
Y = torch.tensor([[0.3, 0.0]], dtype=D)


def described(steps, length, samples):
    """The visits as the paper's code counts them: down in ones, up where a jump is left."""
    left = dict.fromkeys(range(0, steps - length + 1, length), samples - 1)  # steps to go
    place, found = steps, [steps]
    while place > 0:
        place -= 1
        found.append(place)
        if left.get(place, 0) > 0:
            left[place] -= 1
            place += length
            found.append(place)
    return [steps - k for k in found]


@pytest.mark.parametrize(
    ("steps", "length", "samples"), [(6, 1, 3), (7, 2, 2), (20, 10, 10), (23, 5, 3), (5, 5, 2)]
)
def test_visits_are_those_of_the_paper(steps, length, samples):
    solver = RePaint(MASK, Y, jump_length=length, jump_n_sample=samples)
    visits = solver.visits(steps)
    assert visits == described(steps, length, samples)
    falls = [(a, b) for a, b in itertools.pairwise(visits) if b > a]
    rest = steps % length
    for k in range(steps):
        assert falls.count((k, k + 1)) == (1 if k < rest else samples)
    assert solver.evaluations(steps) == len(falls) + 1


def test_a_jump_is_no_longer_than_the_grid():
    assert RePaint(MASK, Y, jump_length=10, jump_n_sample=2).visits(2) == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("inner", ["ancestral", "heun", "pc", "vabm"])
def test_evaluations_are_known_beforehand(inner, mixture):
    solver = RePaint(MASK, Y, solver=inner, jump_length=2, jump_n_sample=3)
    seen = []
    out = sd.sample(
        mixture.score(sd.VP()), (2, 2), solver=solver, steps=7, dtype=D, grid="logsnr",
        callback=lambda i, t, x: seen.append((i, t)),
    )  # fmt: skip
    assert out.nfe == solver.evaluations(7)
    assert out.converged
    assert out.steps == 7
    # The callback is told of jumps, too, each to the time where it has led.
    assert [i for i, _ in seen] == list(range(1, len(solver.visits(7))))
    times = sd.grids.LogSNR()(sd.VP(), 7, 1.0, sd.VP().t_min_sampling)
    assert [t for _, t in seen] == pytest.approx(times[solver.visits(7)[1:]].tolist())


def test_a_budget_is_not_exceeded():
    for solver in (
        RePaint(MASK, Y, jump_length=10, jump_n_sample=10),
        RePaint(MASK, Y, jump_length=1, jump_n_sample=3),
        RePaint(MASK, Y, solver="heun", jump_length=4, jump_n_sample=2),
    ):
        for budget in (30, 100, 256, 500):
            steps = solver.within(budget)
            assert solver.evaluations(steps) <= budget < solver.evaluations(steps + 1)
    with pytest.raises(ValueError, match="needs 11 evaluations for one step, got 10"):
        RePaint(MASK, Y, jump_n_sample=10).within(10)


def test_progress_knows_all_moves(monkeypatch, mixture):
    import tqdm

    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            bars.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    solver = RePaint(MASK, Y, jump_length=2, jump_n_sample=3)
    sd.sample(mixture.score(sd.VP()), (2, 2), solver=solver, steps=6, dtype=D, progress=True)
    assert bars[0].total == bars[0].n == len(solver.visits(6)) - 1


@pytest.mark.parametrize("name", list(LAWS))
@pytest.mark.parametrize("noise_std", [0.0, 0.6])
def test_state_at_every_visit_has_the_law_of_the_process_given_y_and_the_data(name, noise_std):
    sde, (operator, _, y), moves = LAWS[name](), measured(noise_std), []

    def check(step, t, x):
        follows_the_law(sde, t, x, noise_std)
        moves.append(t)

    solver = RePaint(operator, y, noise_std, "ancestral", jump_length=2, jump_n_sample=2)
    sd.sample(point(sde), (8000, 4), solver=solver, steps=8, seed=1, callback=check, dtype=D)
    assert sum(b > a for a, b in itertools.pairwise(moves)) == 4


@pytest.mark.parametrize("name", list(LAWS))
def test_a_jump_below_the_measurement_s_noise_is_pinned_to_it(name):
    sde, tau, n = LAWS[name](), 3.0, 40_000
    known = Known.of(MASK, Y, tau, torch.zeros(1, 2, dtype=D))
    s, t = (Level.at(sde, sde.time(-math.log(q))) for q in (1.0, 2.5))
    c = torch.tensor([[0.4, -0.2]], dtype=D)
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=D)
    u = known.up(c, s, t, z) / t.alpha
    # u_t = u_s + noise of q_t^2 - q_s^2, and m = u_t + noise of tau^2 - q_t^2: two Gaussians.
    before, after = 2.5**2 - 1, tau**2 - 2.5**2
    precision = torch.tensor([1 / before + 1 / after, 1 / before], dtype=D)
    start = c[0] / s.alpha
    mean = torch.stack([start[0] / before + 0.3 / after, start[1] / before]) / precision
    close_to(u, mean, precision.rsqrt())


def test_a_jump_keeps_what_is_not_measured_correlated(mixture):
    """Up from s to t the unmeasured part moves by p(x_t | x_s), not by a new draw."""
    solver = RePaint(nothing(), torch.zeros(1, 1, dtype=D), jump_length=1, jump_n_sample=2)
    sde, states = sd.VP(), []
    sd.sample(
        mixture.score(sde), (20000, 2), solver=solver, steps=6, seed=0, dtype=D,
        callback=lambda i, t, x: states.append((t, x.clone())),
    )  # fmt: skip
    for (s, x), (t, y) in itertools.pairwise(states):
        if t > s:
            a, v = sde.transition(t, s)
            close_to((y - a * x) / v, torch.zeros(2), torch.ones(2))


def test_once_down_is_replacement(mixture):
    score = mixture.score(sd.VP())
    once = sd.sample(
        score,
        (4, 2),
        solver=RePaint(MASK, Y, 0.1, jump_n_sample=1),
        steps=12,
        dtype=D,
        grid="logsnr",
    )
    plain = sd.sample(score, (4, 2), solver=Replacement(MASK, Y, 0.1), steps=12, dtype=D)
    assert torch.equal(once.x, plain.x)


def test_resampling_comes_closer_to_the_posterior(mixture):
    score = mixture.score(sd.VP())
    y = torch.tensor([[-0.2, 0.0]], dtype=D)
    truth = mixture.posterior(MASK, y, 0.0).sample(2000, torch.Generator().manual_seed(0))
    truth = truth[:, 1].sort().values

    def distance(solver, steps):
        x = sd.sample(
            score, (2000, 2), solver=solver, steps=steps, dtype=D, seed=4, grid="logsnr"
        ).x
        return float((x[:, 1].sort().values - truth).square().mean().sqrt())

    plain = distance(Replacement(MASK, y), 25)
    more = distance(RePaint(MASK, y, jump_length=1, jump_n_sample=6), 25)
    assert more < 0.75 * plain


def test_a_sample_alone_is_that_of_the_batch(mixture):
    score = mixture.score(sd.VP())
    solver = RePaint(MASK, Y, 0.2, jump_length=2, jump_n_sample=2)
    both = sd.sample(score, (3, 2), solver=solver, steps=6, dtype=D).x
    for i in range(3):
        alone = sd.sample(score, (1, 2), solver=solver, steps=6, dtype=D, start_index=i).x
        torch.testing.assert_close(alone[0], both[i], rtol=1e-12, atol=1e-12)


def test_the_end_is_y_where_known(sde, mixture):
    solver = RePaint(MASK, Y, jump_length=2, jump_n_sample=2)
    out = sd.sample(mixture.score(sde), (3, 2), solver=solver, steps=6, dtype=D)
    assert torch.equal(out.x[:, 0], Y[0, 0].expand(3))
    assert out.converged


def test_what_is_said_of_the_solver_is_plain(mixture):
    solver = RePaint(MASK, Y, 0.1, "ancestral", jump_length=3, jump_n_sample=2)
    out = sd.sample(mixture.score(sd.VP()), (2, 2), solver=solver, steps=3)
    assert json.loads(json.dumps(out.solver)) == {
        "name": "repaint", "operator": "mask", "noise_std": 0.1,
        "solver": {"name": "ancestral", "variance": "small"},
        "jump_length": 3, "jump_n_sample": 2,
    }  # fmt: skip


def test_its_own_steps_and_grid_are_taken_when_nothing_is_said(mixture):
    out = sd.sample(mixture.score(sd.VP()), (2, 2), solver=RePaint(MASK, Y), dtype=D)
    assert (out.steps, out.nfe) == (50, 251)
    assert out.grid == sd.config.describe(sd.grids.Logistic())


def test_what_does_not_fit_is_refused(mixture):
    with pytest.raises(ValueError, match="jump_length >= 1"):
        RePaint(MASK, Y, jump_length=0)
    with pytest.raises(ValueError, match="jump_n_sample >= 1"):
        RePaint(MASK, Y, jump_n_sample=0)
    with pytest.raises(ValueError, match="Brownian path has one noise"):
        sd.sample(mixture.score(sd.VP()), (2, 2), solver=RePaint(MASK, Y), brownian=True)
