"""What is to be run: solvers times grids times step counts, or budgets of evaluations.

A budget becomes the largest step count whose evaluations, the last denoising included, do not
exceed it. They are counted, not computed: the solver runs on a score that costs nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import solvers as room
from ..config import build
from ..grids import Grid, grid_of
from ..sampling import sample
from ..sde.base import match
from ..solvers.base import Solver

ADAPTIVE_COST = 300
"""Evaluations that a progress bar allows for a solver that chooses its steps."""


@dataclass(frozen=True)
class Trial:
    """One solver on one grid at one step count.

    Args:
        solver: the solver.
        grid: where it steps; None if it chooses its steps, as for ``steps``.
        steps: how often.
        budget: evaluations that were allowed, where that is how the steps were found.
        message: why it cannot run; empty if it can.
    """

    solver: Solver
    grid: Grid | None = None
    steps: int | None = None
    budget: int | None = None
    message: str = ""

    @property
    def cost(self) -> int:
        """Evaluations, for a progress bar."""
        if self.steps is None:
            return ADAPTIVE_COST
        return self.steps * self.solver.nfe_per_step + 1


def plan(
    solvers: Iterable[Any],
    grids: Iterable[Any] | None,
    steps: Sequence[int],
    budgets: Sequence[int] | None,
    sde: Any,
    shape: tuple[int, ...],
) -> list[Trial]:
    """Every solver on every grid at every count; one that chooses its steps, once.

    Args:
        solvers: names, sections or objects; what comes twice runs once.
        grids: the same; each solver's own grid if None.
        steps: step counts, unless there are budgets.
        budgets: evaluations for a sample.
        sde: the process.
        shape: of one item.

    Raises:
        ConfigError: for an unknown solver or grid.
        ValueError: for an empty list or a count below 1.
    """
    chosen: list[Solver] = [build(section, room, "solver") for section in solvers]
    wanted = None if grids is None else [grid_of(section) for section in grids]
    counts = steps if budgets is None else budgets
    if not chosen or not counts or wanted == []:
        raise ValueError("compare needs at least one solver, one grid and one step count")
    for count in counts:
        if count < 1:
            raise ValueError(f"a step count or budget must be at least 1, got {count}")
    trials: list[Trial] = []
    for solver in chosen:
        if solver.default_steps is None or solver.default_grid is None:
            trials.append(Trial(solver))
            continue
        for grid in wanted or [grid_of(solver.default_grid)]:
            found = (
                [Trial(solver, grid, count) for count in counts]
                if budgets is None
                else [within(solver, grid, b, sde, shape) for b in budgets]
            )
            seen: list[int | None] = []
            for trial in found:  # two budgets may allow the same steps
                if trial.steps is None or trial.steps not in seen:
                    trials.append(trial)
                seen.append(trial.steps)
    return [trial for i, trial in enumerate(trials) if trial not in trials[:i]]


def within(solver: Solver, grid: Grid, budget: int, sde: Any, shape: tuple[int, ...]) -> Trial:
    """The trial with the most steps that takes at most ``budget`` evaluations.

    The count is taken to grow with the steps. Where a solver's cost depends on the score, the
    row may still exceed the budget, and says so.
    """

    @lru_cache
    def count(steps: int) -> int:
        return evaluations(solver, grid, steps, sde, shape)

    low, high = 0, budget + 1  # the answer is in [low, high)
    guess = min(max((budget - 1) // solver.nfe_per_step, 1), budget)
    try:
        for steps in (guess, guess + 1):  # mostly right, and then two counts suffice
            if low < steps < high:
                low, high = (steps, high) if count(steps) <= budget else (low, steps)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if count(middle) <= budget else (low, middle)
        least = count(1) if low == 0 else 0
    except Exception:  # the run itself will say what is wrong
        return Trial(solver, grid, guess, budget)
    if low == 0:
        return Trial(
            solver, grid, None, budget, f"one step takes {least} evaluations, more than {budget}"
        )
    return Trial(solver, grid, low, budget)


def evaluations(solver: Solver, grid: Grid, steps: int, sde: Any, shape: tuple[int, ...]) -> int:
    """Evaluations of a run of so many steps, the last denoising included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sample(White(sde), (1, *shape), solver=solver, grid=grid, steps=steps)
    return math.ceil(found.mean_nfe)


class White:
    """The score of standard normal data, for counting: ``-x / (alpha^2 + sigma^2)``."""

    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, sde: Any) -> None:
        self.sde = sde

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """One evaluation."""
        return -x / match(self.sde.alpha(t) ** 2 + self.sde.sigma(t) ** 2, x)
