"""One solve of a likelihood's integral, whatever the method: what is asked, how, and what it gave.

A :class:`Problem` is what is to be found, a :class:`Way` how, and both know how to be varied: the
same items with other probes, some of them with shorter steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import grids
from ..config import describe, unknown
from ..path import Path
from ..precision import FLOOR
from ..sde.base import select
from ..solvers.base import Solver
from . import stepped
from .divergence import EXACT_DIMS, Field, draw_probes, exact, hutchinson, turned
from .field import Divergence, Flow
from .integrate import Carried, carry
from .terminal import Terminal, terminal_log_prob

Report = Callable[[float, float, int], None]
DIVERGENCES = ("auto", "exact", "hutchinson")


@dataclass(frozen=True)
class Way:
    """How the ODE is solved: a method with its steps or its tolerances."""

    method: str | dict[str, Any] | Solver
    steps: int | None
    grid: Any
    rtol: float
    atol: float
    max_nfe: int
    hold: int = 1
    """Points of the grid that share the signs of their probes."""

    @property
    def adaptive(self) -> bool:
        """Whether the method chooses its steps."""
        return self.steps is None

    def chosen(self) -> tuple[Solver, grids.Grid] | None:
        """The solver and its grid, None for a method of its own steps; refuses what is neither."""
        return stepped.choose(self.method, self.steps, self.grid, self.max_nfe)

    def coarser(self) -> Way:
        """Half the steps, or ten times the tolerance."""
        if self.steps is not None:
            return replace(self, steps=max(1, self.steps // 2))
        return replace(self, rtol=self.rtol * 10, atol=self.atol * 10)

    def finer(self) -> Way:
        """Twice the steps, or a tenth of the tolerance."""
        if self.steps is not None:
            return replace(self, steps=self.steps * 2)
        return replace(self, rtol=self.rtol / 10, atol=self.atol / 10)

    def refined(self, times: int, dtype: torch.dtype) -> Way:
        """So many times the steps, or for each doubling a tenth of the tolerance.

        No tolerance falls below what a state of this dtype resolves. The probes turn where those
        of the unrefined way do: what the two differ by is its steps.
        """
        if self.steps is not None:
            return replace(
                self,
                steps=self.steps * times,
                hold=self.hold * times,
                max_nfe=self.max_nfe * times,
            )
        less, least = 10.0 ** -math.log2(times), FLOOR[dtype]
        rtol, atol = (max(t * less, min(t, least)) for t in (self.rtol, self.atol))
        return replace(self, rtol=rtol, atol=atol, max_nfe=self.max_nfe * times)

    def described(self) -> dict[str, Any]:
        """The fields of a result that tell of it."""
        chosen = self.chosen()
        solver, grid = (None, None) if chosen is None else map(describe, chosen)
        return {
            "method": str(self.method) if solver is None else solver["name"],
            "solver": solver, "grid": grid, "steps": self.steps,
            "rtol": self.rtol, "atol": self.atol,
        }  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Whose density is asked for, between which times, and how the divergence is seen."""

    score: Any
    x: Tensor
    cond: dict[str, Any]
    t_min: float
    t_max: float
    terminal: Terminal | None
    divergence: str
    noise: str
    seed: int
    start_index: int

    @property
    def exact(self) -> bool:
        """Whether the divergence has no error of its own."""
        return self.divergence == "exact"

    def probes(self, first: int, last: int) -> Tensor | None:
        """Probes ``first`` to ``last - 1`` of every item, ``(k, B, *shape)``; None if exact."""
        if self.exact:
            return None
        drawn = draw_probes(self.x, last, self.noise, self.seed, self.start_index)
        return drawn[first:]

    def cloned(self) -> Problem:
        """The same of a copy of the data, made under the modes that are on now."""
        return replace(self, x=self.x.clone())

    def some(self, rows: Tensor) -> Problem:
        """The same of some items; their probes are to be drawn from the whole."""
        return replace(self, x=self.x[rows], cond=select(self.cond, rows))


def divergence_of(name: str, x: Tensor) -> str:
    """``"exact"`` or ``"hutchinson"``: what ``"auto"`` stands for is decided by the dimensions.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in DIVERGENCES:
        raise unknown("divergence", name, DIVERGENCES)
    if name == "auto":
        return "exact" if x[0].numel() <= EXACT_DIMS else "hutchinson"
    return name


@dataclass(frozen=True)
class Solve:
    """What one solve gave: the latent and its prior ``(B,)``, estimates ``(B, k)`` of the rest."""

    carried: Carried
    prior: Tensor

    @property
    def estimates(self) -> Tensor:
        """Log-likelihood by each probe, ``(B, k)``, nan of items that did not arrive."""
        values = self.prior[:, None] + self.carried.deltas
        if self.carried.failures:
            values = values.clone()
            values[list(self.carried.failures)] = math.nan
        return values


def solve(
    problem: Problem, way: Way, probes: Tensor | None, report: Report | None = None
) -> Solve:
    """Solves the integral once, with these probes ``(k, B, *shape)``, exactly without any."""
    x, estimate = problem.x, _estimator(probes)
    chosen = way.chosen()
    if chosen is None:
        path = Path(problem.score.sde, problem.t_min, problem.t_max)
        flow = Flow(problem.score, path, estimate, tuple(x.shape), problem.cond)
        done = carry(
            flow, x, 1 if probes is None else len(probes), str(way.method), rtol=way.rtol,
            atol=way.atol, steps=way.steps, max_nfe=way.max_nfe, report=report,
        )  # fmt: skip
    else:
        assert way.steps is not None
        solver, places = chosen
        times = places(problem.score.sde, way.steps, problem.t_max, problem.t_min).flip(0)
        turning = _turning(probes, problem.noise, way.hold)
        done = stepped.integrate(solver, problem.score, x, times, turning, report, problem.cond)
    prior = terminal_log_prob(problem.score.sde, done.latent, problem.t_max, problem.terminal)
    total = prior[:, None] + done.deltas
    for item in (~total.isfinite().all(1)).nonzero()[:, 0].tolist():
        done.failures.setdefault(item, "the log-likelihood is not finite")
    return Solve(done, prior)


def _estimator(probes: Tensor | None) -> Divergence:
    """The divergence of a field: exact, or by the probes of the rows that are still under way."""
    if probes is None:
        return lambda field, z, rows: exact(field, z)

    def estimate(field: Field, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        here = probes if len(z) == probes.shape[1] else probes[:, rows]
        return hutchinson(field, z, here)

    return estimate


def _turning(probes: Tensor | None, noise: str, hold: int) -> Divergence:
    """The same along a grid, the probes' signs turning at each ``hold``-th point."""
    if probes is None:
        return _estimator(None)
    points = itertools.count(hold // 2)

    def estimate(field: Field, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return hutchinson(field, z, turned(probes, next(points) // hold, noise))

    return estimate
