"""Solvers times grids times counts, and budgets that are not exceeded by one evaluation."""

import pytest
import torch

import scoresde as sd
from scoresde.bench import Overlapping, Target, compare
from scoresde.bench.plan import evaluations, plan, within
from scoresde.grids import Karras, LogSNR
from scoresde.solvers import DDIM, DPM3S, PC, Heun, Langevin, UniPC

VP = sd.VP()


def test_every_solver_runs_on_every_grid_and_adaptive_ones_once():
    wanted = [{"name": "karras", "rho": 3}, "logsnr"]
    found = plan(["ddim", "ode", "ddim", "ode"], wanted, [5, 9, 5], None, VP, (2,))
    seen = [(t.solver, t.grid, t.steps) for t in found]
    assert seen == [
        (DDIM(), Karras(3.0), 5), (DDIM(), Karras(3.0), 9), (DDIM(), LogSNR(), 5),
        (DDIM(), LogSNR(), 9), (sd.solvers.ODE(), None, None),
    ]  # fmt: skip


def test_each_solver_has_its_own_grid_by_default():
    found = plan(["heun", "ddim"], None, [5], None, VP, (2,))
    assert [t.grid for t in found] == [Karras(), LogSNR()]


@pytest.mark.parametrize(
    "solver", [DDIM(), Heun(), DPM3S(), UniPC(), PC(corrector=Langevin(steps=3))], ids=str
)
@pytest.mark.parametrize("budget", [5, 8, 21])
def test_a_budget_allows_the_most_steps_that_fit(solver, budget):
    trial = within(solver, LogSNR(), budget, VP, (2,))
    assert trial.budget == budget
    assert evaluations(solver, LogSNR(), trial.steps, VP, (2,)) <= budget
    assert evaluations(solver, LogSNR(), trial.steps + 1, VP, (2,)) > budget


def test_a_wrong_guess_of_the_cost_is_corrected(monkeypatch):
    """The count decides, whatever a class says that a step costs."""
    for said in (1, 7):
        monkeypatch.setattr(Heun, "nfe_per_step", said)
        assert within(Heun(), LogSNR(), 20, VP, (2,)).steps == 9


def test_budgets_end_in_rows_with_their_true_cost():
    law = Overlapping(2)
    target = Target.exact(law, samples=50)
    rows = compare(law.mixture().score(VP), target, solvers=["heun", "ddim"], samples=50,
                   nfe=[2, 8, 9, 10])  # fmt: skip
    assert [(r.solver, r.budget, r.steps, r.nfe) for r in rows] == [
        ("heun", 2, None, None), ("heun", 8, 3, 7), ("heun", 9, 4, 9),
        ("ddim", 2, 1, 2), ("ddim", 8, 7, 8), ("ddim", 9, 8, 9), ("ddim", 10, 9, 10),
    ]  # fmt: skip
    assert rows[0].message == "one step takes 3 evaluations, more than 2"
    assert not rows[0].converged


def test_a_cost_that_depends_on_the_score_is_said(monkeypatch):
    """The plan counts on white noise; here the real score costs two evaluations more."""
    law, real = Overlapping(2), DDIM.step

    def step(self, reverse, x, t, s, noise, state):
        if isinstance(reverse._score, sd.MixtureScore) and s < 0.5:
            reverse.score(x, t)
        return real(self, reverse, x, t, s, noise, state)

    monkeypatch.setattr(DDIM, "step", step)
    target = Target.exact(law, samples=50)
    (row,) = compare(law.mixture().score(VP), target, solvers=["ddim"], samples=50, nfe=[6])
    assert row.nfe > 6
    assert row.message == f"takes {row.nfe} evaluations where 6 were allowed"


def test_what_cannot_be_counted_fails_in_its_row(monkeypatch):
    def step(*arguments):
        raise KeyError("coefficients")

    monkeypatch.setattr(Heun, "step", step)
    law = Overlapping(2)
    target = Target.exact(law, samples=50)
    (row,) = compare(law.mixture().score(VP), target, solvers=["heun"], samples=50, nfe=[7])
    assert row.message == "KeyError: 'coefficients'"
    assert row.nfe is None


def test_counting_draws_nothing_and_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    within(sd.solvers.Ancestral(), LogSNR(), 9, VP, (2,))
    assert torch.equal(torch.random.get_rng_state(), state)
