r"""Time grids tuned to a model: the points of a solver's steps, placed by its error at the end.

For reference trajectories ``x*`` of the probability-flow ODE, which a tight adaptive solve gives
once, the points ``lam_i`` (log-SNR, increasing, fixed ends) minimise

    log (E |e|^2)^(1/2) + log E |e|,    e = Phi(x*_T; lam) - x*_0,
    lam_i = lam_0 + (lam_N - lam_0) sum_{j<=i} softmax(theta)_j

by stochastic gradients through the steps ``Phi`` of the solver itself, which weighs every local
error by what the rest of the way makes of it. Where trajectories part between modes the error has
a heavy tail: a few of them make up the mean square, the others the mean distance, and both count.
Trajectories are drawn in proportion to their error (and reweighted, so that the mean is still
theirs), and the search starts from the best fixed grid. What it found is judged on trajectories
that it has not seen, beside every fixed grid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import grids, solvers
from .config import ConfigError, build, describe
from .model import evaluating, home, per_sample
from .noise import KeyedNoise
from .sde.base import select
from .solvers.base import Solver

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
LOOKS = 4
"""Times that the error of all trajectories is measured during the search."""


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
        return {**asdict(self), "grid": describe(self.grid)}


@torch.inference_mode(False)  # whose tensors carry no gradient
@torch.enable_grad()
def tune(
    score: Any,
    solver: str | dict[str, Any] | Solver,
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
    progress: Callable[[str, float], None] | None = None,
    **cond: Any,
) -> Tuning:
    """Places the points of ``steps`` steps of a deterministic solver for a score.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``sde``, differentiable in ``x`` and ``t``.
        solver: solver that steps along a grid, its name or its section.
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
        ConfigError: for an unknown solver or one that draws noise or chooses its steps.
        ValueError: for numbers out of range, or if the reference does not converge.
    """
    began = time.perf_counter()
    method = _fitting(build(solver, solvers, "solver"))
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
        ends = _reference(score, method, x, start, end, batch, cond, tell)
        search = _Search(score, method, x[:trajectories], ends[:trajectories],
                         select(cond, slice(trajectories)), batch)  # fmt: skip
        judge = _Search(score, method, x[trajectories:], ends[trajectories:],
                        select(cond, slice(trajectories, None)), batch)  # fmt: skip
        candidates = {name: grid(sde, steps, start, end) for name, grid in FIXED.items()}
        known = {name: rms(search.errors(times)) for name, times in candidates.items()}
        first = min(known, key=lambda name: known[name])
        times = search.descend(candidates[first], iterations, rate, seed, tell)
        seen = rms(search.errors(times))
        if not seen < known[first]:  # the search has found nothing better
            times, seen = candidates[first], known[first]
        tell("judging", 0.0)
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
        seen=seen,
        trajectories=trajectories,
        held_out=held_out,
        t_start=start,
        t_end=end,
        seconds=time.perf_counter() - began,
    )


def rms(squares: Tensor) -> float:
    """Root of the mean of squared errors."""
    return float(squares.mean().sqrt())


def start_noise(
    score: Any, shape: tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Start noise of the trajectories: the prior's, as :func:`scoresde.sample` draws it."""
    return score.sde.prior_sample(shape, KeyedNoise(seed), device=device, dtype=dtype)


def _fitting(method: Any) -> Solver:
    """The solver, if its steps can be placed."""
    if not isinstance(method, Solver) or method.stochastic or method.default_steps is None:
        name = describe(method)["name"]
        raise ConfigError(
            f"solver {name!r} cannot be tuned: it draws noise or chooses its own steps; "
            "accepted are deterministic solvers on a grid, such as vabm, unipc, dpmpp-3m or heun"
        )
    return method


def _reference(
    score: Any,
    method: Solver,
    x: Tensor,
    start: float,
    end: float,
    batch: int,
    cond: dict[str, Any],
    tell: Callable[[str, float], None],
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


@dataclass(frozen=True)
class _Search:
    """Trajectories with known ends, and the solver whose points are sought."""

    score: Any
    method: Solver
    x: Tensor
    ends: Tensor
    cond: dict[str, Any]
    batch: int

    def squares(self, times: Tensor, rows: Tensor) -> Tensor:
        """Mean square error of some trajectories, ``(len(rows),)``, differentiable in ``times``.

        The solver's own steps, without the guards and the account of its loop.
        """
        reverse = self.method.reverse(self.score, **select(self.cond, rows))
        x = self.x[rows]
        state = self.method.init(reverse, x, times, None)
        for t, s in pairwise(times.unbind()):
            x, state = self.method.step(reverse, x, t, s, None, state)
        return (x - self.ends[rows]).flatten(1).square().mean(1)

    @torch.no_grad()
    def errors(self, times: Tensor) -> Tensor:
        """Mean square error of every trajectory, float64 on the CPU."""
        every = torch.arange(len(self.x), device=self.x.device)
        parts = [self.squares(times, rows) for rows in every.split(max(self.batch, 256))]
        return torch.cat(parts).cpu().double()

    def descend(
        self,
        times: Tensor,
        iterations: int,
        rate: float,
        seed: int,
        tell: Callable[[str, float], None],
    ) -> Tensor:
        """The points after the search, from those given."""
        sde = self.score.sde
        ladder = sde.log_snr(times)
        theta = ladder.diff().log().requires_grad_()
        optimizer = torch.optim.Adam([theta], lr=rate, betas=(0.9, 0.98))
        generator = torch.Generator().manual_seed(seed)
        for i in range(iterations):
            if i % max(1, iterations // LOOKS) == 0:
                sizes = self.errors(_points(sde, ladder, theta).detach()).nan_to_num(0).sqrt()
                chance = sizes + sizes.mean() + torch.finfo(sizes.dtype).tiny
                chance = chance / chance.sum()
            tell("tuning", i / iterations)
            optimizer.param_groups[0]["lr"] = rate / 2 * (1 + math.cos(math.pi * i / iterations))
            rows = torch.multinomial(chance, self.batch, replacement=True, generator=generator)
            weight = (1 / (chance[rows] * len(self.x))).to(self.x)
            squares = self.squares(_points(sde, ladder, theta), rows.to(self.x.device))
            # The mean square is made by the few; the mean distance keeps the many in sight.
            distance = (squares + torch.finfo(squares.dtype).tiny).sqrt()
            loss = (weight * squares).mean().log() / 2 + (weight * distance).mean().log()
            if not bool(loss.isfinite()):
                break
            (theta.grad,) = torch.autograd.grad(loss, theta)  # and none of a network's weights
            torch.nn.utils.clip_grad_norm_([theta], 1.0)
            optimizer.step()
        found = _points(sde, ladder, theta).detach()
        found[0], found[-1] = times[0], times[-1]
        return found


def _points(sde: Any, ladder: Tensor, theta: Tensor) -> Tensor:
    """Decreasing times of the steps whose lengths in log-SNR are as ``exp(theta)``.

    Differentiable for every process, by ``dt/d log_snr = -2 sigma^2/g^2``.
    """
    share = torch.softmax(theta, 0).cumsum(0)
    inner = ladder[0] + (ladder[-1] - ladder[0]) * share[:-1]
    lam = torch.cat([ladder[:1], inner, ladder[-1:]])
    t = sde.time(lam.detach())
    return t - 2 * (sde.sigma(t) / sde.diffusion(t)) ** 2 * (lam - lam.detach())


__all__ = ["Tuning", "tune"]
