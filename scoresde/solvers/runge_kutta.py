r"""Embedded Runge-Kutta methods in which every sample has steps of its own.

Of a batch of independent problems ``dy_i/ds = F(s, y_i)``, each is solved as if it were alone:

    k_j = F(s + c_j h, y + h sum_l a_jl k_l),    y' = y + h sum_j b_j k_j
    error = |h sum_j e_j k_j / (atol + rtol max(|y|, |y'|))|,    accepted if <= 1
    h'  = h clamp(0.8 error^(-1/q), 0.2, 10)

with ``s``, ``h`` and ``error`` one a sample. A sample that has arrived leaves the batch, so the
work done is the sum of what each needs. Times and steps are kept in float64 on the CPU; the
device is waited for once a step, to learn its errors.

Sources: A family of embedded Runge-Kutta formulae (Dormand & Prince, 1980),
https://doi.org/10.1016/0771-050X(80)90013-3; Solving Ordinary Differential Equations I (Hairer,
Norsett & Wanner, 1993), II.4 for the control of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from ..noise import KeyedNoise, NoiseSource

Field = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``field(s, y, rows)``: derivatives ``(b, N)`` at ``s (b,)``, for ``rows (b,)`` of the batch."""
Norm = Callable[[Tensor, Tensor], Tensor]
"""Size ``(b,)`` of scaled errors ``(b, N)`` of steps to ``s (b,)``."""
SHORTEST = 1e-4
"""Part of the way below which a step that meets values that are not finite is given up."""


@dataclass(frozen=True)
class Pair:
    """An explicit method with an error estimate, the last stage of which starts the next step.

    Args:
        order: order of the solution that is carried on.
        estimate: order in ``h`` of the error estimate.
        a: rows of the coefficients of the stages; the last is ``b``, the solution's weights.
        c: places of the stages in the step, the first 0.
        e: weights of the error estimate, one a stage.
    """

    order: int
    estimate: int
    a: tuple[tuple[float, ...], ...]
    c: tuple[float, ...]
    e: tuple[float, ...]

    @property
    def nfe_per_step(self) -> int:
        """Evaluations of a step: its first stage is the last of the step before."""
        return len(self.a)


BOSH3 = Pair(
    order=3,
    estimate=3,
    a=((1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    c=(0, 1 / 2, 3 / 4, 1),
    e=(-5 / 72, 1 / 12, 1 / 9, -1 / 8),
)
DOPRI5 = Pair(
    order=5,
    estimate=5,
    a=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    c=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    e=(71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)


@cache
def dop853() -> Pair:
    """Dormand and Prince's method of order 8 with the fifth-order estimate; SciPy's table."""
    from scipy.integrate import DOP853

    rows = [tuple(map(float, row[:i])) for i, row in enumerate(DOP853.A)][1:]
    rows.append(tuple(map(float, DOP853.B)))
    places = (*map(float, DOP853.C), 1.0)
    return Pair(8, 6, tuple(rows), places, tuple(map(float, DOP853.E5)))


PAIRS: dict[str, Callable[[], Pair]] = {
    "dopri5": lambda: DOPRI5,
    "bosh3": lambda: BOSH3,
    "dop853": dop853,
}


@dataclass(frozen=True)
class Solved:
    """Where each sample of a batch arrived.

    Args:
        s: place reached, float64 on the CPU, ``(B,)``.
        y: state there, ``(B, N)``.
        nfe: evaluations, int64 on the CPU, ``(B,)``.
        failures: by row, why a sample stopped before the end.
    """

    s: Tensor
    y: Tensor
    nfe: Tensor
    failures: dict[int, str]


def solve(
    field: Field,
    y: Tensor,
    start: float,
    end: float,
    pair: Pair,
    *,
    norm: Norm,
    rtol: float,
    atol: float,
    first_step: float,
    max_nfe: int,
    report: Callable[[Solved], None] | None = None,
) -> Solved:
    """Solves ``dy/ds = field`` from ``start`` to ``end`` for each row of ``y (B, N)`` by itself.

    Args:
        field: the right-hand side.
        y: states at ``start``.
        start: first place.
        end: last place, on either side of ``start``; nothing is evaluated beyond it.
        pair: the method.
        norm: size of the scaled errors.
        rtol: relative tolerance.
        atol: absolute tolerance.
        first_step: length of the first step that is tried, > 0.
        max_nfe: evaluations that a sample may take.
        report: called after each attempt with the state of things.
    """
    way, total = end - start, len(y)
    shortest = min(first_step / 10, 16 * torch.finfo(y.dtype).eps * abs(way))
    done = Solved(
        torch.full((total,), start, dtype=torch.float64),
        y.clone(),
        torch.ones(total, dtype=torch.int64),
        {},
    )
    items = torch.arange(total)  # who is still under way; the rows of s, h, y and k are theirs
    rows = items.to(y.device)
    s = done.s.clone()
    h = torch.full_like(s, math.copysign(min(first_step, abs(way)), way))
    k = field(s, y, rows)
    retried = torch.zeros(total, dtype=torch.bool)
    if 1 + pair.nfe_per_step > max_nfe:
        return replace(done, failures=dict.fromkeys(range(total), SPENT))
    while len(items):
        left = end - s
        last = h.abs() >= left.abs()
        h = torch.where(last, left, h)
        target = torch.where(last, end, s + h)
        trial, k_end, error = _attempt(field, pair, s, target, h, y, k, rows)
        scaled = error / (atol + rtol * torch.maximum(y.abs(), trial.abs()))
        ratio = norm(scaled, target).cpu().double()  # the one wait for the device
        accepted = ratio <= 1
        here = accepted.to(y.device)[:, None]
        s = torch.where(accepted, target, s)
        y, k = torch.where(here, trial, y), torch.where(here, k_end, k)
        factor = (0.8 * ratio ** (-1 / pair.estimate)).nan_to_num(0.2).clamp(0.2, 10)
        h = h * torch.where(retried, factor.clamp_max(1), factor)
        retried = ~accepted

        done.s[items] = s
        done.nfe[items] += pair.nfe_per_step
        lost = ~ratio.isfinite() & (h.abs() < SHORTEST * abs(way))
        stuck = h.abs() < shortest
        spent = done.nfe[items] + pair.nfe_per_step > max_nfe
        going = s != end
        for reason, met in ((NOT_FINITE, lost), (TOO_SMALL, stuck), (SPENT, spent)):
            done.failures.update(dict.fromkeys(items[going & met].tolist(), reason))
            going = going & ~met
        if report is not None:
            done.y[rows] = y
            report(done)
        if not bool(going.all()):
            done.y[rows] = y
            stay = going.to(y.device)
            items, s, h, retried = items[going], s[going], h[going], retried[going]
            rows, y, k = rows[stay], y[stay], k[stay]
    return done


NOT_FINITE = "the right-hand side is not finite"
TOO_SMALL = "the step fell below what the tolerances can use"
SPENT = "the evaluations allowed are used up"


def first_of(failures: dict[int, str]) -> tuple[int, str]:
    """The first row that failed, and why; with the number of others."""
    row, reason = min(failures.items())
    others = len(failures) - 1
    return row, f"{reason}, and {others} more" if others else reason


def named(row: int, noise: NoiseSource | None) -> str:
    """What a message calls a row: its index in the series that the noise's samples are of."""
    return f"sample {row + (noise.start if isinstance(noise, KeyedNoise) else 0)}"


def _attempt(
    field: Field,
    pair: Pair,
    s: Tensor,
    target: Tensor,
    h: Tensor,
    y: Tensor,
    k: Tensor,
    rows: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The state at ``target = s + h``, its derivative, and the estimate of its error."""
    step = h.to(y.dtype).to(y.device)[:, None]
    stages, trial = [k], y
    for a, c in zip(pair.a, pair.c[1:], strict=True):
        trial = y + step * _combine(a, stages)
        stages.append(field(target if c == 1 else s + c * h, trial, rows))
    return trial, stages[-1], step * _combine(pair.e, stages)


def _combine(weights: tuple[float, ...], stages: list[Tensor]) -> Tensor:
    """``sum_j w_j k_j``."""
    total = torch.zeros_like(stages[0])
    for weight, stage in zip(weights, stages, strict=True):
        if weight:
            total.add_(stage, alpha=weight)
    return total
