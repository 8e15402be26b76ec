r"""Gradients of the log-likelihood: in the data, the conditions and the parameters of the score.

Backpropagation through the steps gives the gradient of the number that was computed. For steps
``y_{i+1} = step_i(y_i; theta)``, whose lengths count as constants,

    a_i = (d y_{i+1}/d y_i)^T a_{i+1},    d/d theta = sum_i (d y_{i+1}/d theta)^T a_{i+1}

The steps are taken without a graph and their states kept; on the way back each is taken anew with
its graph, so that memory holds the states and the graph of one step. The steps contain a
divergence: their graph holds second derivatives of the score. The other way, which keeps nothing
but the latent, is the adjoint ODE of :mod:`~scoresde.likelihood.adjoint`.

Sources: Training Deep Nets with Sublinear Memory Cost (Chen et al., 2016),
https://arxiv.org/abs/1604.06174; FFJORD: Free-form Continuous Dynamics for Scalable Reversible
Generative Models (Grathwohl et al., 2019), https://arxiv.org/abs/1810.01367.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError, describe
from ..grids import Grid
from ..model import evaluating
from ..path import Path
from ..precision import tolerance
from ..solvers import runge_kutta
from ..solvers.base import Solver
from ..solvers.tableau import TABLEAUS, Tableau
from .adjoint import adjoint_solve
from .divergence import turned
from .field import Divergence, Flow
from .integrate import FIXED, PER_SAMPLE, Carried
from .recompute import Advance, Bearing, differentiable
from .solve import Problem, Solve, Way
from .stepped import Watched
from .terminal import terminal_log_prob

RULES = {**{name: name for name in FIXED}, "rk4": "rk38"}
"""Tableaus of the fixed-step methods: torchdiffeq's ``rk4`` is the rule of three eighths."""


def differentiable_solve(
    problem: Problem, way: Way, probes: Tensor | None, *, adjoint: bool = False
) -> Solve:
    """What :func:`~scoresde.likelihood.solve.solve` finds, to rounding, with its graph.

    Args:
        problem: its ``x`` and conditions carry gradients where they require them.
        way: how it is solved. Through the steps: the adaptive pairs, the fixed-step methods, and
            solvers that step along a grid; by the adjoint: any.
        probes: of the divergence, ``(k, B, *shape)``, exact without any.
        adjoint: the gradient by the adjoint ODE.

    Raises:
        ConfigError: for a method whose steps cannot be taken one by one.
    """
    bearing = Bearing.of(problem.score, problem.x, problem.t_min, problem.cond)
    with evaluating(problem.score):
        if adjoint:
            carried = adjoint_solve(problem, way, probes, bearing)
        else:
            carried = _unrolled(problem, way, probes, bearing)
    prior = terminal_log_prob(problem.score.sde, carried.latent, problem.t_max, problem.terminal)
    for item in (~(prior[:, None] + carried.deltas).isfinite().all(1)).nonzero()[:, 0].tolist():
        carried.failures.setdefault(item, "the log-likelihood is not finite")
    return Solve(carried, prior)


def _unrolled(problem: Problem, way: Way, probes: Tensor | None, bearing: Bearing) -> Carried:
    """The solve, step by step."""
    chosen = way.chosen()
    if chosen is not None:
        return _along_grid(problem, way, *chosen, probes, bearing)
    if way.method not in (*PER_SAMPLE, *FIXED):
        raise ConfigError(
            f"the steps of {way.method!r} cannot be differentiated: take the adjoint, one of "
            f"{', '.join((*PER_SAMPLE, *FIXED))}, or a solver along a grid"
        )
    path = Path(problem.score.sde, problem.t_min, problem.t_max)
    run = _RungeKutta(problem, way, path, differentiable(probes), bearing)
    return run.solve(1 if probes is None else len(probes))


class _RungeKutta:
    """Explicit Runge-Kutta steps of the flow in ``y = (z, delta/D)``, as ``integrate.carry``."""

    def __init__(
        self, problem: Problem, way: Way, path: Path, divergence: Divergence, bearing: Bearing
    ) -> None:
        self.problem, self.way, self.path = problem, way, path
        self.divergence, self.bearing = divergence, bearing
        self.method = str(way.method)

    def flow(self, cond: dict[str, Any]) -> Flow:
        """The right-hand side."""
        shape = tuple(self.problem.x.shape)
        return Flow(self.problem.score, self.path, self.divergence, shape, cond)

    def solve(self, count: int) -> Carried:
        """The solve with ``count`` estimates of the divergence."""
        x = self.problem.x
        dims, first = x[0].numel(), float(self.path(0.0).scale)
        y = torch.cat([x.flatten(1) * first, x.new_zeros(len(x), count)], 1)
        y, s, nfe, failures = (self.fixed if self.method in FIXED else self.adaptive)(y)
        last = self.path(s).scale[:, None]
        latent = (y[:, :dims] / last.to(y)).reshape(x.shape)
        deltas = dims * (y[:, dims:] + (first / last).log().to(y))
        return Carried(latent, deltas, nfe, failures, self.path.time(s))

    def fixed(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[int, str]]:
        """Equal steps for the whole batch."""
        tableau, count = TABLEAUS[RULES[self.method]], self.way.steps or 1
        taken = min(count, self.way.max_nfe // len(tableau.b))
        places, rows = torch.linspace(0, 1, count + 1, dtype=torch.float64), _all(y)
        for s, target in pairwise(places[: taken + 1]):
            (y,) = self.bearing.step(self.advance(tableau, s, target, rows), (y,))
        lost = (~y.isfinite().all(1)).nonzero()[:, 0].tolist()
        failures = dict.fromkeys(lost, runge_kutta.NOT_FINITE)
        if taken < count:
            failures = dict.fromkeys(range(len(y)), runge_kutta.SPENT)
        nfe = torch.full((len(y),), taken * len(tableau.b))
        return y, places[taken].expand(len(y)), nfe, failures

    def adaptive(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[int, str]]:
        """Each sample's own steps: found without a graph, then lined up with one."""
        pair, way, flow = runge_kutta.PAIRS[self.method](), self.way, self.flow(self.problem.cond)
        before = torch.zeros(len(y), dtype=torch.float64)
        taken: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

        def note(done: runge_kutta.Solved) -> None:
            moved = (done.s != before).nonzero()[:, 0]
            if len(moved):
                rows = moved.to(y.device)
                taken.append((rows, before[moved], done.s[moved], done.y[rows]))
                before.copy_(done.s)

        with torch.no_grad():
            done = runge_kutta.solve(
                flow, y.detach(), 0.0, 1.0, pair, norm=lambda error, s: flow.norm(error),
                rtol=tolerance(way.rtol, y.dtype), atol=tolerance(way.atol, y.dtype),
                first_step=self.path.first_step, max_nfe=way.max_nfe, report=note,
            )  # fmt: skip
        tableau = Tableau(pair.a[:-1], pair.a[-1], pair.c[:-1])
        for rows, s, target, known in taken:
            whole = len(rows) == len(y)
            advance = self.advance(tableau, s, target, rows)
            (new,) = self.bearing.step(advance, (y if whole else y[rows],), known)
            y = new if whole else y.index_copy(0, rows, new)
        return y, done.s, done.nfe, dict(done.failures)

    def advance(self, tableau: Tableau, s: Tensor, target: Tensor, rows: Tensor) -> Advance:
        """The step from ``s`` to ``target``, each ``()`` or ``(b,)``, of the rows ``(b,)``."""

        def step(state: Sequence[Tensor], cond: dict[str, Any]) -> tuple[Tensor, ...]:
            (y,), flow, h = state, self.flow(cond), target - s
            length = h.to(y.dtype).to(y.device)[:, None] if h.ndim else h
            stages: list[Tensor] = []
            for row, c in zip(((), *tableau.a), tableau.c, strict=True):
                place = target if c == 1 else s + c * h
                stages.append(flow(place, y + length * _sum(row, stages), rows))
            return (y + length * _sum(tableau.b, stages),)

        return step


def _sum(weights: tuple[float, ...], stages: list[Tensor]) -> Tensor | float:
    """``sum_j w_j k_j`` of the stages that count."""
    return sum((w * k for w, k in zip(weights, stages, strict=True) if w), 0.0)


def _all(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)


def _along_grid(
    problem: Problem, way: Way, solver: Solver, grid: Grid, probes: Tensor | None,
    bearing: Bearing,
) -> Carried:  # fmt: skip
    """A solver's steps along a grid, and the divergence at each of its points."""
    if type(solver).integrate is not Solver.integrate:
        name = describe(solver)["name"]
        raise ConfigError(f"the steps of {name!r} cannot be differentiated: take the adjoint")
    assert way.steps is not None
    times = grid(problem.score.sde, way.steps, problem.t_max, problem.t_min).flip(0)
    run = _GridSteps(problem, solver, probes)
    x, found = problem.x, []
    run.after = solver.init(solver.reverse(problem.score), x.detach(), times, None)
    for point, (t, s) in enumerate(pairwise(times.unbind())):
        advance, held = run.advance(point, t, s)
        x, div, *held = bearing.step(advance, (x, *held))
        run.after = _filled(run.after, held)
        found.append(div)
    found += bearing.step(run.look(len(found), times[-1]), (x,))
    # Summed by what sums the likelihood without a graph.
    watched = Watched(problem.score, differentiable(probes), times, x)
    watched.found = found
    lost = (~x.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
    return Carried(
        x,
        watched.log_det(),
        torch.full((len(x),), run.nfe),
        dict.fromkeys(lost, "non-finite values"),
        times[-1].expand(len(x)),
    )


class _GridSteps:
    """Steps of a solver as functions of tensors: the state, and what it holds between steps."""

    def __init__(self, problem: Problem, solver: Solver, probes: Tensor | None) -> None:
        self.problem, self.solver, self.probes, self.nfe = problem, solver, probes, 0
        self.after: Any = None
        """What the last step left to the next."""

    def watched(self, point: int, t: Tensor, x: Tensor) -> Watched:
        """The score that notes its divergence at ``t``, by the probes as they stand there."""
        probes = self.probes
        if probes is not None:
            probes = turned(probes, point, self.problem.noise)
        return Watched(self.problem.score, differentiable(probes), t[None], x)

    def advance(self, point: int, t: Tensor, s: Tensor) -> tuple[Advance, list[Tensor]]:
        """The step from ``t`` to ``s`` after the last one, and the tensors it is to be given."""
        held: list[Tensor] = []
        frame = _emptied(self.after, held)

        def step(state: Sequence[Tensor], cond: dict[str, Any]) -> tuple[Tensor, ...]:
            x, *held = state
            watched = self.watched(point, t, x)
            reverse = self.solver.reverse(watched, **cond)
            moved, after = self.solver.step(reverse, x, t, s, None, _filled(frame, held))
            reverse.nfe += watched.passed(x, cond)
            rest: list[Tensor] = []
            emptied = _emptied(after, rest)
            if not torch.is_grad_enabled():
                self.nfe, self.after = self.nfe + reverse.nfe, emptied
            return (moved, watched.found[0], *rest)

        return step, held

    def look(self, point: int, t: Tensor) -> Advance:
        """The divergence at ``t`` as a step that leads to nothing else."""

        def step(state: Sequence[Tensor], cond: dict[str, Any]) -> tuple[Tensor, ...]:
            watched = self.watched(point, t, state[0])
            watched(state[0], t, **cond)
            self.nfe += not torch.is_grad_enabled()
            return (watched.found[0],)

        return step


def _emptied(state: Any, held: list[Tensor]) -> Any:
    """``state`` with an empty tensor for each that differs between items: these go to ``held``."""

    def take(part: Tensor) -> Tensor:
        held.append(part)
        return part.new_empty(0)

    return _mapped(state, take)


def _filled(frame: Any, held: Sequence[Tensor]) -> Any:
    """The state that :func:`_emptied` has taken apart."""
    rest = iter(held)
    return _mapped(frame, lambda _: next(rest))


def _mapped(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``change`` of all tensors but scalars in tuples, lists, dictionaries and dataclasses."""
    if isinstance(state, Tensor):
        return change(state) if state.ndim else state
    if isinstance(state, tuple | list):
        parts = [_mapped(part, change) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    if isinstance(state, dict):
        return {key: _mapped(part, change) for key, part in state.items()}
    if is_dataclass(state) and not isinstance(state, type):
        named = {f.name: _mapped(getattr(state, f.name), change) for f in fields(state) if f.init}
        return replace(state, **named)
    return state
