r"""Latents: the probability-flow ODE run from data to noise, and back.

    encode:  z = x(t_max)  of  dx/dt = f(x, t) - g(t)^2/2 score(x, t),    x(t_min) = x
    decode:  x = x(t_min)  of the same ODE from  x(t_max) = z

The map is one to one, and takes data to (nearly) white noise. Between two latents the way goes
along the sphere on which noise lies, not through its empty middle (:mod:`scoresde.sphere`).

Source: P11.13456.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import grids, solvers
from .conditions import check_used
from .config import describe
from .model import evaluating, per_sample
from .noise import KeyedNoise
from .sampling import Samples, initial, pick, place, reporting, sample
from .sde.base import as_time, repeated
from .solvers.base import Callback, Solver
from .sphere import slerp

DEFAULT_SOLVER = "runge-kutta"
"""Each sample at its own pace, within tolerances."""


@dataclass(frozen=True, eq=False)
class Latents:
    """Latents of data, and how they were obtained.

    Args:
        z: states at ``t_max``, shape ``(B, *shape)``; of a sample that did not arrive, the state
            reached.
        nfe: evaluations of the score for each sample, int64, ``(B,)``.
        converged: whether a sample reached ``t_max`` with finite values, bool, ``(B,)``.
        message: if one did not, what happened and what to do.
        seconds: wall-clock time.
        solver: name and fields of the solver, tolerances included.
        grid: name and fields of the grid; None if the solver chose its steps.
        steps: number of steps; None likewise.
        t_min: time at which the data stand.
        t_max: time of the latents.
        weights: ``"ema"`` or ``"raw"`` for a network, None for other scores.
    """

    z: Tensor
    nfe: Tensor
    converged: Tensor
    message: str
    seconds: float
    solver: dict[str, Any]
    grid: dict[str, Any] | None
    steps: int | None
    t_min: float
    t_max: float
    weights: str | None


@dataclass(frozen=True, eq=False)
class Interpolation:
    """Ways between pairs of items through their latents.

    Args:
        x: the way of each pair, shape ``(B, count, *shape)``, in model range; its ends are the
            items themselves, encoded and decoded.
        start: latents of the first items.
        end: latents of the second items.
        round_trip: root mean square over an item of what encoding and decoding changed, for both
            ends, in model range, ``(B, 2)``.
        samples: the decoded items in a row, ``(B * count, *shape)``, with NFE and settings.
    """

    x: Tensor
    start: Latents
    end: Latents
    round_trip: Tensor
    samples: Samples


@torch.no_grad()
def encode(
    score: Any,
    x: Tensor,
    *,
    solver: str | dict[str, Any] | Solver = DEFAULT_SOLVER,
    steps: int | None = None,
    grid: str | dict[str, Any] | grids.Grid | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    start_index: int = 0,
    callback: Callback | None = None,
    progress: bool = False,
    **cond: Any,
) -> Latents:
    """The latents of data, by the probability-flow ODE from ``t_min`` to ``t_max``.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``sde``; a module is put into evaluation
            mode meanwhile.
        x: data in model range, floating point, shape ``(B, *shape)``.
        solver: any deterministic solver, its name or its section. ``"runge-kutta"`` keeps its
            tolerances for each sample by itself; those with fixed steps step up the grid.
        steps: number of steps; the solver's own number if None.
        grid: grid, its name or its section; the solver's own if None.
        t_min: time at which the data stand, ``sde.t_min_likelihood`` if None.
        t_max: time of the latents, ``sde.t_max`` if None.
        device: device of the state; by default that of the score.
        dtype: float32 or float64, of the state; by default that of ``x``.
        start_index: index of the first item, for a batch out of a longer series: messages name
            items by it.
        callback: called as ``callback(step, t, x)`` after each step.
        progress: whether to show a bar after two seconds.
        cond: conditions, one value a sample, given to the score at each call.

    Raises:
        ValueError: a stochastic solver, or data, times, steps or conditions that do not fit.
        ConfigError: for an unknown solver or grid.
    """
    began = time.perf_counter()
    sde = score.sde
    method = deterministic(solver)
    low, high = _interval(sde, t_min, t_max)
    if not x.is_floating_point() or not bool(x.isfinite().all()):
        raise ValueError(
            f"encode needs finite floating-point data in model range, got {x.dtype}"
            + ("" if x.is_floating_point() else ": take integer data there by scaler.encode(x)")
        )
    places, times = place(score, method, steps, grid, high, low)
    x = initial(score, sde, KeyedNoise(0), None, x, device, dtype)
    cond = per_sample(cond, x)
    check_used(score, cond, x)
    reverse = method.reverse(score, **cond)
    with evaluating(score), reporting(callback, progress, len(times) - 1, "encoding") as report:
        noise = KeyedNoise(0, start_index)  # none is drawn
        solution = method.integrate(reverse, x, times.flip(0), noise, report)
    t = as_time(solution.t).cpu().double().expand(len(x))
    arrived = (t >= high).to(x.device) & solution.x.flatten(1).isfinite().all(1)
    nfe = torch.full((len(x),), reverse.nfe) if solution.nfe is None else solution.nfe
    return Latents(
        z=solution.x,
        nfe=nfe.to(x.device),
        converged=arrived,
        message=solution.message,
        seconds=time.perf_counter() - began,
        solver=describe(method),
        grid=None if places is None else describe(places),
        steps=None if places is None else len(times) - 1,
        t_min=low,
        t_max=high,
        weights=getattr(score, "weights", None),
    )


def decode(
    score: Any,
    z: Tensor | Latents,
    *,
    solver: str | dict[str, Any] | Solver | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
    **settings: Any,
) -> Samples:
    """The data of latents: the same ODE back, without noise and without a last denoising.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``sde``.
        z: states at ``t_max``, shape ``(B, *shape)``, or :class:`Latents`, whose solver and times
            are then the defaults.
        solver: any deterministic solver; ``"runge-kutta"`` if None and ``z`` is a tensor.
        t_min: time at which the data stand, ``sde.t_min_likelihood`` if None.
        t_max: time of the latents, ``sde.t_max`` if None.
        settings: ``steps``, ``grid``, ``device``, ``progress``, conditions and the like, as for
            :func:`scoresde.sample`.

    Raises:
        ValueError: a stochastic solver, or what :func:`scoresde.sample` refuses.
    """
    if isinstance(z, Latents):
        if solver is None and z.steps is not None:
            settings = {"steps": z.steps, "grid": z.grid, **settings}
        solver = z.solver if solver is None else solver
        t_min, t_max = (z.t_min if t_min is None else t_min), (z.t_max if t_max is None else t_max)
        z = z.z
    low, high = _interval(score.sde, t_min, t_max)
    method = deterministic(DEFAULT_SOLVER if solver is None else solver)
    return sample(score, x_T=z, solver=method, t_start=high, t_end=low, denoise=False, **settings)


def interpolate(
    score: Any,
    a: Tensor,
    b: Tensor,
    count: int = 8,
    **settings: Any,
) -> Interpolation:
    """Ways from items ``a`` to items ``b``: encoded, interpolated by :func:`slerp`, decoded.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``sde``.
        a: first items in model range, ``(B, *shape)``.
        b: second items, the same.
        count: items of a way, both ends included, >= 2, at equal shares.
        settings: as for :func:`encode`; they hold for both directions, conditions for both ends.

    Raises:
        ValueError: shapes that differ, fewer than two items, or what :func:`encode` refuses.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"interpolate needs items of one shape, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if count < 2:
        raise ValueError(f"interpolate needs count >= 2, both ends included, got {count}")
    start, end = encode(score, a, **settings), encode(score, b, **settings)
    n = len(a)
    shares = torch.linspace(0, 1, count, dtype=torch.float64, device=start.z.device)
    first, last = (part.z.repeat_interleave(count, 0) for part in (start, end))
    z = slerp(first, last, shares.repeat(n))
    samples = decode(score, z, **repeated(settings, count))
    x = samples.x.reshape(n, count, *a.shape[1:])
    errors = [rms(x[:, 0] - a.to(x)), rms(x[:, -1] - b.to(x))]
    return Interpolation(x, start, end, torch.stack(errors, 1), samples)


def rms(difference: Tensor) -> Tensor:
    """Root mean square over an item, ``(B,)`` of ``(B, *shape)``."""
    return difference.flatten(1).square().mean(1).sqrt()


def deterministic(solver: str | dict[str, Any] | Solver) -> Solver:
    """The solver, refused if it draws noise.

    Raises:
        ValueError: naming some that do not.
    """
    method: Solver = pick(solver, solvers, "solver", Solver)
    if method.stochastic:
        raise ValueError(
            f"latents need a deterministic solver, and {describe(method)['name']!r} draws noise: "
            "take runge-kutta, heun, dpmpp-3m or another of the ODE"
        )
    return method


def _interval(sde: Any, t_min: float | None, t_max: float | None) -> tuple[float, float]:
    """The times of data and of latents, checked against the trained ones."""
    low = sde.t_min_likelihood if t_min is None else float(t_min)
    high = sde.t_max if t_max is None else float(t_max)
    if not sde.t_min <= low < high <= sde.t_max:
        raise ValueError(
            f"latents need t_min < t_max within the trained times [{sde.t_min:g}, "
            f"{sde.t_max:g}], got t_min={low:g}, t_max={high:g}"
        )
    return low, high


__all__ = ["Interpolation", "Latents", "decode", "encode", "interpolate"]
