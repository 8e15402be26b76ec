r"""Tuned grids: the points of a solver's steps, placed by the error that they leave at the end.

For reference trajectories of the probability-flow ODE, which a tight adaptive solve gives once,
the points are sought by gradients through the steps of the solver itself
(:mod:`scoresde.tuning.search`), which weighs every local error by what the rest of the way makes
of it. The search starts from the best fixed grid. What it found is judged on trajectories that it
has not seen, beside every fixed grid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import grids, solvers
from ..config import ConfigError, build, describe
from ..model import evaluating, home, per_sample
from ..noise import KeyedNoise
from ..sde.base import select
from ..solvers.base import Solver
from .search import Search, Tell, criterion, rms

FIXED: dict[str, grids.Grid] = {
    "karras": grids.Karras(),
    "logsnr": grids.LogSNR(),
    "logistic": grids.Logistic(),
    "logistic:width=2": grids.Logistic(2.0),
    "quadratic": grids.Quadratic(),
    "uniform": grids.Uniform(),
}
"""Grids that a tuned one has to beat."""
REFERENCE = {"name": "runge-kutta", "rtol": 1e-5, "atol": 1e-5, "max_nfe": 20000}
EXACT_REFERENCE = {**REFERENCE, "method": "dop853", "rtol": 1e-9, "atol": 1e-9}
"""Reference of a float64 score."""
Spec = str | dict[str, Any] | Solver
TRIAL = 4
"""Of several solvers, each has this part of the search's iterations before one is chosen."""


@dataclass(frozen=True)
class Tuning:
    """A tuned grid and the evidence for it.

    Args:
        grid: the points.
        solver: section of the solver that they belong to.
        steps: number of steps.
        error: root mean square distance of the end points from the reference's, in the model's
            range, on trajectories that the search did not see.
        median: median over those trajectories of their root mean square distance.
        fixed: the same root mean square distance under each fixed grid.
        fixed_median: the same median.
        seen: ``error`` on the trajectories of the search.
        tried: of several solvers, the section of each and its ``error`` on those trajectories
            when one was chosen, in the order given; empty if there was no choice.
        trajectories: how many the search had.
        held_out: how many it did not.
        t_start: time at which the grid starts.
        t_end: time at which it ends.
        seconds: wall-clock time of all.
    """

    grid: grids.Tuned
    solver: dict[str, Any]
    steps: int
    error: float
    median: float
    fixed: dict[str, float]
    fixed_median: dict[str, float]
    seen: float
    tried: tuple[tuple[dict[str, Any], float], ...]
    trajectories: int
    held_out: int
    t_start: float
    t_end: float
    seconds: float

    @property
    def best_fixed(self) -> str:
        """The fixed grid of the smallest error."""
        return min(self.fixed, key=lambda name: self.fixed[name])

    @property
    def gain(self) -> float:
        """Error of the best fixed grid over that of this one; above 1, tuning has helped."""
        return self.fixed[self.best_fixed] / self.error

    def entry(self) -> dict[str, Any]:
        """Everything as plain values for YAML or JSON."""
        tried = [{"solver": section, "seen": error} for section, error in self.tried]
        return {**asdict(self), "grid": describe(self.grid), "tried": tried}


@torch.inference_mode(False)  # whose tensors carry no gradient
@torch.enable_grad()
def tune(
    score: Any,
    solver: Spec | Sequence[Spec],
    steps: int,
    *,
    shape: tuple[int, ...] | None = None,
    trajectories: int = 256,
    held_out: int = 128,
    iterations: int = 200,
    batch: int = 32,
    rate: float = 0.05,
    seed: int = 0,
    t_start: float | None = None,
    t_end: float | None = None,
    progress: Tell | None = None,
    **cond: Any,
) -> Tuning:
    """Places the points of ``steps`` steps of a deterministic solver for a score.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``sde``, differentiable in ``x`` and ``t``.
        solver: solver that steps along a grid, its name or its section; or several, of which the
            one that does best in a short search of its own is searched for in full. They have to
            cost as many evaluations a step.
        steps: number of steps, >= 2.
        shape: of one item; ``score.shape`` if None.
        trajectories: reference trajectories that the search may use, >= 2; more generalise better.
        held_out: further ones that judge the result, >= 2.
        iterations: steps of the search, 0 to judge the fixed grids alone.
        batch: trajectories of one step of the search.
        rate: step size of the search (Adam), of the logarithms of the steps' lengths.
        seed: of the start noise and of the choice of batches.
        t_start: time of the first point, ``sde.t_max`` if None.
        t_end: time of the last, ``sde.t_min_sampling`` if None.
        progress: called as ``progress(what, fraction)`` on the way.
        cond: conditions, one value a trajectory (those of the search, then those held out).

    Raises:
        ConfigError: for an unknown solver or one that draws noise or chooses its steps, or for
            several that cost differently.
        ValueError: for numbers out of range, or if the reference does not converge.
    """
    began = time.perf_counter()
    methods = _fitting(solver)
    for name, value, least in (
        ("steps", steps, 2), ("trajectories", trajectories, 2), ("held_out", held_out, 2),
        ("iterations", iterations, 0), ("batch", batch, 1),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"tune needs {name} >= {least}, got {value}")
    sde, shape = score.sde, shape or getattr(score, "shape", None)
    if shape is None:
        raise ValueError("tune needs the shape of one item, which this score does not say")
    start = sde.t_max if t_start is None else float(t_start)
    end = sde.t_min_sampling if t_end is None else float(t_end)
    if not sde.t_min <= end < start <= sde.t_max:
        raise ValueError(
            f"tune needs t_end < t_start within the trained times [{sde.t_min:g}, "
            f"{sde.t_max:g}], got t_end={end:g}, t_start={start:g}"
        )
    tell = progress or (lambda what, fraction: None)
    device, dtype = home(score)
    count = trajectories + held_out
    with evaluating(score):
        x = start_noise(score, (count, *shape), seed, device, dtype)
        cond = per_sample(cond, x)
        ends = _reference(score, x, start, end, batch, cond, tell)

        def search(method: Solver, rows: slice) -> Search:
            return Search(score, method, x[rows], ends[rows], select(cond, rows), batch)

        candidates = {name: grid(sde, steps, start, end) for name, grid in FIXED.items()}
        trials = []
        for method in methods:
            one = search(method, slice(trajectories))
            times = min(candidates.values(), key=lambda t: _rank(one.errors(t)))
            part = iterations if len(methods) == 1 else iterations // TRIAL
            trials.append((method, *one.descend(times, part, rate, seed, tell)))
        method, times, seen = min(trials, key=lambda trial: _rank(trial[2]))
        if len(methods) > 1:
            times, seen = search(method, slice(trajectories)).descend(
                times, iterations, rate, seed, tell
            )
        tell("judging", 0.0)
        judge = search(method, slice(trajectories, None))
        found = judge.errors(times)
        fixed = {name: judge.errors(points) for name, points in candidates.items()}
    return Tuning(
        grid=grids.Tuned(tuple(sde.log_snr(times).tolist())),
        solver=describe(method),
        steps=steps,
        error=rms(found),
        median=float(found.sqrt().median()),
        fixed={name: rms(e) for name, e in fixed.items()},
        fixed_median={name: float(e.sqrt().median()) for name, e in fixed.items()},
        seen=rms(seen),
        tried=tuple((describe(m), rms(e)) for m, _, e in trials) if len(trials) > 1 else (),
        trajectories=trajectories,
        held_out=held_out,
        t_start=start,
        t_end=end,
        seconds=time.perf_counter() - began,
    )


def _rank(squares: Tensor) -> float:
    """The criterion of the search, infinite for what is not finite."""
    value = float(criterion(squares))
    return value if math.isfinite(value) else math.inf


def start_noise(
    score: Any, shape: tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Start noise of the trajectories: the prior's, as :func:`scoresde.sample` draws it."""
    return score.sde.prior_sample(shape, KeyedNoise(seed), device=device, dtype=dtype)


def _fitting(solver: Any) -> list[Solver]:
    """The solvers, if their steps can be placed, and compared."""
    several = isinstance(solver, Sequence) and not isinstance(solver, str)
    methods = [build(one, solvers, "solver") for one in (solver if several else [solver])]
    for method in methods:
        if not isinstance(method, Solver) or method.stochastic or method.default_steps is None:
            raise ConfigError(
                f"solver {describe(method)['name']!r} cannot be tuned: it draws noise or chooses "
                "its own steps; accepted are deterministic solvers on a grid, such as vabm, "
                "unipc, dpmpp-3m or heun"
            )
    costs = {describe(method)["name"]: method.nfe_per_step for method in methods}
    if len(set(costs.values())) > 1:
        have = ", ".join(f"{name} {cost}" for name, cost in costs.items())
        raise ConfigError(f"solvers to choose from need equal evaluations a step, got {have}")
    if not methods:
        raise ConfigError("tune needs a solver")
    return methods


def _reference(
    score: Any,
    x: Tensor,
    start: float,
    end: float,
    batch: int,
    cond: dict[str, Any],
    tell: Tell,
) -> Tensor:
    """Ends of the trajectories by a tight adaptive solve."""
    exact = x.dtype == torch.float64
    reference = build(EXACT_REFERENCE if exact else REFERENCE, solvers, "solver")
    times = torch.tensor([start, end], dtype=torch.float64)
    size = 1024 if exact else 4 * batch
    parts = []
    with torch.no_grad():
        for first in range(0, len(x), size):
            tell("reference", first / len(x))
            rows = slice(first, first + size)
            reverse = reference.reverse(score, **select(cond, rows))
            found = reference.integrate(reverse, x[rows], times)
            if not found.converged:
                raise ValueError(f"the reference did not converge: {found.message}")
            parts.append(found.x)
    return torch.cat(parts)


__all__ = ["Tuning", "tune"]
