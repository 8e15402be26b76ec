"""Solvers of the flow on ``s`` in [0, 1]: ours, a step a sample; torchdiffeq's and SciPy's beside.

torchdiffeq's adaptive methods overstep the interval and interpolate back unless the end is named
as ``step_t``, and their rule for the first step evaluates wherever it likes: both are set here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import unknown
from ..precision import tolerance, widest
from ..solvers.runge_kutta import NOT_FINITE, PAIRS, SPENT, TOO_SMALL, Solved, solve
from .field import Flow

PER_SAMPLE = tuple(PAIRS)
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
TORCHDIFFEQ = tuple(
    f"torchdiffeq-{name}" for name in ("dopri5", "dopri8", "bosh3", "adaptive_heun")
)
SCIPY = {"scipy-rk45": "RK45", "scipy-dop853": "DOP853"}
MAX_NFE = 2000
"""Evaluations that a sample may take when not told."""
METHODS = (*PER_SAMPLE, *FIXED, *TORCHDIFFEQ, *SCIPY)


class Halt(Exception):  # noqa: N818 (an end, not an error)
    """The solve cannot go on; the message says why."""


Report = Callable[[float, float, int], None]
"""``report(fraction, t, nfe)``: how far the samples are on average, and what they have cost."""


class Carried(NamedTuple):
    """Where a method has led.

    Args:
        latent: ``(B, *shape)``.
        deltas: estimates of the integrated divergence, ``(B, k)``.
        nfe: evaluations of each item, ``(B,)``.
        failures: why an item did not arrive.
        t: time that each item has reached, ``(B,)``.
    """

    latent: Tensor
    deltas: Tensor
    nfe: Tensor
    failures: dict[int, str]
    t: Tensor


def check(method: str, steps: int | None) -> None:
    """Refuses unknown methods, and steps that are missing or that a method would ignore."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if method in FIXED and (steps is None or steps < 1):
        raise ValueError(f"method {method!r} takes fixed steps: give steps >= 1, got {steps}")
    if method not in FIXED and steps is not None:
        raise ValueError(f"method {method!r} chooses its own steps: give rtol and atol, not steps")


def carry(flow: Flow, x: Tensor, count: int, method: str, **settings: Any) -> Carried:
    """Takes ``x (B, *shape)`` with ``count`` estimates of its divergence to the path's end."""
    path, dims = flow.path, flow.dims
    first = float(path(0.0).scale)
    y = torch.cat([x.flatten(1) * first, x.new_zeros(len(x), count)], 1)
    done = integrate(flow, y, method, **settings)
    last = path(done.s).scale[:, None]
    latent = (done.y[:, :dims] / last.to(x)).reshape(x.shape)
    # z = scale x, so that log p_x = log p_z + D log scale at either end.
    deltas = dims * (done.y[:, dims:] + (first / last).log().to(x))
    return Carried(latent, deltas, done.nfe, dict(done.failures), path.time(done.s))


def integrate(
    flow: Flow,
    y: Tensor,
    method: str,
    *,
    rtol: float,
    atol: float,
    steps: int | None,
    max_nfe: int,
    report: Report | None = None,
) -> Solved:
    """Integrates ``y (B, D + k)`` from ``s = 0`` to 1 by any of the methods."""
    if method not in FIXED:
        rtol, atol = tolerance(rtol, y.dtype), tolerance(atol, y.dtype)
    if method not in PER_SAMPLE:
        return _Common(flow, max_nfe, report).solve(y, method, rtol, atol, steps)

    def tell(done: Solved) -> None:
        s = float(done.s.mean())
        assert report is not None
        report(s, float(flow.path.time(s)), int(done.nfe.max()))

    if report is not None:
        report(0.0, flow.path.t_min, 0)
    return solve(
        flow, y, 0.0, 1.0, PAIRS[method](), norm=lambda error, s: flow.norm(error),
        rtol=rtol, atol=atol, first_step=flow.path.first_step, max_nfe=max_nfe,
        report=tell if report else None,
    )  # fmt: skip


class _Common:
    """Methods with one step for the whole batch, and where they last stood."""

    def __init__(self, flow: Flow, max_nfe: int, report: Report | None) -> None:
        self.flow, self.max_nfe, self.report = flow, max_nfe, report

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        """``dy/ds`` within the budget, refused where it is not finite."""
        if self.flow.nfe >= self.max_nfe:
            raise Halt(SPENT)
        s = s.cpu().double()
        out = self.flow(s, y, self.rows)
        finite = out.isfinite().all(1)
        if not bool(finite.all()):
            raise Halt(
                f"{NOT_FINITE} at t={float(self.flow.path.time(s)):.6g} "
                f"for item {int((~finite).nonzero()[0])}"
            )
        return out

    def callback_step(self, s: Tensor, y: Tensor, step: Tensor) -> None:
        """Called, under this name, by torchdiffeq where a step starts."""
        self.s, self.y = float(s), y
        if self.report is not None:
            self.report(self.s, float(self.flow.path.time(self.s)), self.flow.nfe)

    def norm(self, error: Tensor) -> Tensor:
        """The largest error of any sample."""
        return self.flow.norm(error).max()

    def solve(self, y: Tensor, method: str, rtol: float, atol: float, steps: int | None) -> Solved:
        """Integrates; the whole batch stops where one of its samples must."""
        self.rows, reason = torch.arange(len(y), device=y.device), ""
        self.s, self.y = 0.0, y
        run = self._scipy if method in SCIPY else self._torchdiffeq
        try:
            self.s, self.y = 1.0, run(y, method, rtol, atol, steps)
        except Halt as halt:
            reason = str(halt)
        except AssertionError as error:  # this is how torchdiffeq gives up
            if not str(error).startswith(("underflow in dt", "non-finite values")):
                raise
            reason = TOO_SMALL
        return Solved(
            torch.full((len(y),), self.s, dtype=torch.float64),
            self.y,
            torch.full((len(y),), self.flow.nfe),
            dict.fromkeys(range(len(y)), reason) if reason else {},
        )

    def _torchdiffeq(
        self, y: Tensor, method: str, rtol: float, atol: float, steps: int | None
    ) -> Tensor:
        from torchdiffeq import odeint

        dtype = widest(y.device)
        span = torch.tensor([0.0, 1.0], dtype=dtype, device=y.device)
        if method in FIXED:
            grid = torch.linspace(0, 1, (steps or 1) + 1, dtype=dtype, device=y.device)
            options: dict[str, Any] = {"grid_constructor": lambda *_: grid}
        else:
            first = self.flow.path.first_step
            options = {"norm": self.norm, "step_t": span[-1:], "first_step": first, "dtype": dtype}
        name = method.removeprefix("torchdiffeq-")
        return odeint(self, y, span, rtol=rtol, atol=atol, method=name, options=options)[-1]

    def _scipy(
        self, y: Tensor, method: str, rtol: float, atol: float, steps: int | None
    ) -> Tensor:
        """SciPy's solver on the flattened batch, under one error norm as in score_sde."""
        from scipy import integrate as scipy_integrate

        def to_state(flat: object) -> Tensor:
            return torch.as_tensor(flat).reshape(y.shape).to(y)

        solver = getattr(scipy_integrate, SCIPY[method])(
            lambda s, flat: self(torch.tensor(s), to_state(flat)).flatten().cpu().double().numpy(),
            0.0,
            y.flatten().cpu().double().numpy(),
            1.0,
            rtol=rtol,
            atol=atol,
            first_step=self.flow.path.first_step,
        )
        while solver.status == "running":
            self.callback_step(solver.t, to_state(solver.y), solver.t)
            reason = solver.step()
            if solver.status == "failed":
                raise Halt(str(reason))
        return to_state(solver.y)
