"""A likelihood by any deterministic solver of the package: its steps, from data to noise.

The solver takes the trajectory through the grid, and the divergence, seen once at each point of
it, is summed by :mod:`~scoresde.likelihood.quadrature`: a multistep method costs one evaluation
and one vector-Jacobian product a step, a method of several stages products at the grid's points
alone. What steps too long add to a log-likelihood hardly differs between items: a few of them,
solved with shorter steps, tell what all of them lack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import grids, solvers
from ..config import ConfigError, build, describe, names, unknown
from ..precision import widest
from ..solvers.base import Solver
from .field import Divergence
from .integrate import METHODS, Carried, check
from .quadrature import weights

GRID = "logsnr"
"""Grid of the steps when none is named: a density is made at all noise levels alike."""


def choose(
    method: Any, steps: int | None, grid: Any, max_nfe: int
) -> tuple[Solver, grids.Grid] | None:
    """The solver and the grid that a method stands for; None for one of :data:`METHODS`.

    Raises:
        ConfigError: for an unknown method or grid, or what cannot be stepped.
        ValueError: for steps or a grid that do not fit the method.
    """
    if not (isinstance(method, str) and method in METHODS):
        places = grids.grid_of(GRID if grid is None else grid)
        if isinstance(places, grids.Tuned) and not places.log_snr:
            raise ConfigError("grids are tuned for sampling: a likelihood takes another")
        return stepper(method, steps, max_nfe), places
    check(method, steps)
    if grid is not None:
        raise ValueError(f"method {method!r} has steps of its own: leave out the grid")
    return None


def stepper(method: str | dict[str, Any] | Solver, steps: int | None, max_nfe: int) -> Solver:
    """The solver of a method that is not one of :data:`METHODS`.

    Raises:
        ConfigError: for an unknown method, or a solver that draws noise or chooses its steps.
        ValueError: for no steps, or more than ``max_nfe`` evaluations.
    """
    known = names(solvers)
    fitting = [name for name, kind in known.items() if _fits(kind)]
    if isinstance(method, str) and method not in known and "." not in method:
        raise unknown("method", method, (*METHODS, *fitting))
    solver = build(method, solvers, "method")
    if not isinstance(solver, Solver) or not _fits(solver):
        name = describe(solver)["name"]
        raise ConfigError(
            f"a likelihood cannot be stepped by {name!r}, which draws noise or chooses its steps; "
            f"accepted: {', '.join((*METHODS, *fitting))}"
        )
    name = describe(solver)["name"]
    if steps is None or steps < 1:
        raise ValueError(f"method {name!r} takes fixed steps: give steps >= 1, got {steps}")
    needed = steps * solver.nfe_per_step + 1
    if needed > max_nfe:
        raise ValueError(
            f"{steps} steps of {name!r} take {needed} evaluations, more than max_nfe={max_nfe}"
        )
    return solver


def _fits(solver: Any) -> bool:
    """Whether a solver, or a class of them, follows the ODE along a grid."""
    return not getattr(solver, "stochastic", True) and solver.default_steps is not None


class Watched:
    """A score that also takes its divergence where a grid's points are passed, once at each.

    Args:
        score: the score.
        divergence: ``(field, x, rows) -> (values, divergences (B, k))``.
        times: the grid, increasing.
        x: the batch at its start.
    """

    def __init__(self, score: Any, divergence: Divergence, times: Tensor, x: Tensor) -> None:
        self.sde, self._score, self._divergence = score.sde, score, divergence
        self._times, self._point, self._x = times, 0, x
        self._rows = torch.arange(len(x), device=x.device)
        self.found: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The score; its divergence is noted if this is the first look at a point of the grid."""
        here = self._times[self._point]
        if len(self.found) > self._point or (t is not here and bool((t != here).any())):
            return self._score(x, t, **cond)
        value, div = self._divergence(lambda x: self._score(x, t, **cond), x, self._rows)
        self.found.append(div)
        return value

    def passed(self, x: Tensor, cond: dict[str, Any]) -> int:
        """Told that the next point has been reached, at ``x``; evaluations this has cost."""
        missed = len(self.found) == self._point
        if missed:  # a method that did not look where it stood
            self(self._x, self._times[self._point], **cond)
        self._point, self._x = self._point + 1, x
        return int(missed)

    def log_det(self) -> Tensor:
        """``log det`` from the first point to the last, by each estimate, ``(B, k)``."""
        sde, dims = self.sde, self._x[0].numel()
        alpha, sigma = sde.alpha(self._times), sde.sigma(self._times)
        h = torch.hypot(alpha, sigma)
        div = torch.stack(self.found).to(widest(self._x.device))
        square = (sigma**2)[:, None, None].to(div)
        # Of data of unit variance, known in closed form.
        unit = dims * ((sigma / h) ** 2)[:, None, None].to(div)
        rule = weights(-sde.log_snr(self._times))[:, None, None].to(div)
        grown = (rule * (-square * div - unit)).sum(0)
        return (grown + dims * float((h[-1] / h[0]).log())).to(self._x.dtype)


def integrate(
    solver: Solver,
    score: Any,
    x: Tensor,
    times: Tensor,
    divergence: Divergence,
    report: Callable[[float, float, int], None] | None,
    cond: dict[str, Any],
) -> Carried:
    """Takes ``x`` from the first of the increasing ``times`` to the last."""
    watched = Watched(score, divergence, times, x)
    reverse = solver.reverse(watched, **cond)
    count = len(times) - 1

    def tell(step: int, t: float, x: Tensor) -> None:
        reverse.nfe += watched.passed(x, cond)
        if report is not None:
            report(step / count, t, reverse.nfe)

    out = solver.integrate(reverse, x, times, None, tell)
    watched(out.x, times[-1], **cond)
    lost = (~out.x.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
    return Carried(
        out.x,
        watched.log_det(),
        torch.full((len(x),), reverse.nfe + 1),
        dict.fromkeys(lost, out.message),
        times[-1].expand(len(x)),
    )
