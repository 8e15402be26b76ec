"""A likelihood by any deterministic solver of the package: its steps, from data to noise.

The divergence is one more coordinate of the state (:mod:`~scoresde.likelihood.along`), so that a
multistep method of one evaluation a step takes it along to its own order. What steps too long add
to a log-likelihood hardly differs between items: compare with an adaptive solve of a few of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import grids, solvers
from ..config import ConfigError, build, describe, names, unknown
from ..solvers.base import Solver
from .along import Along
from .integrate import METHODS, Carried, check

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
    if steps * solver.nfe_per_step > max_nfe:
        raise ValueError(
            f"{steps} steps of {name!r} take {steps * solver.nfe_per_step} evaluations, more than "
            f"max_nfe={max_nfe}"
        )
    return solver


def _fits(solver: Any) -> bool:
    """Whether a solver, or a class of them, follows the ODE along a grid."""
    return not getattr(solver, "stochastic", True) and solver.default_steps is not None


def integrate(
    solver: Solver,
    along: Along,
    x: Tensor,
    times: Tensor,
    report: Callable[[float, float, int], None] | None,
    cond: dict[str, Any],
) -> Carried:
    """Takes ``x`` from the first of the increasing ``times`` to the last."""
    reverse = solver.reverse(along, **cond, **along.cond)
    count = len(times) - 1

    def tell(step: int, t: float, _: Tensor) -> None:
        assert report is not None
        report(step / count, t, reverse.nfe)

    out = solver.integrate(reverse, along.open(x), times, None, None if report is None else tell)
    lost = (~out.x.isfinite().all(1)).nonzero()[:, 0].tolist()
    return Carried(
        along.data(out.x),
        along.log_det(out.x, float(times[0]), times[-1]),
        torch.full((len(x),), reverse.nfe),
        dict.fromkeys(lost, out.message),
        times[-1].expand(len(x)),
    )
