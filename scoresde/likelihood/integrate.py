"""Solvers of the probability-flow ODE on ``s`` in [0, 1]: torchdiffeq's, and SciPy's as reference.

torchdiffeq's adaptive methods overstep the interval and interpolate back unless the end is named
as ``step_t``, and their rule for the first step evaluates wherever it likes: both are set here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import unknown
from .path import Flow, Halt

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
SCIPY = {"scipy-rk45": "RK45", "scipy-dop853": "DOP853"}


def check(method: str, steps: int | None) -> None:
    """Refuses unknown methods, and steps that are missing or that a method would ignore."""
    if method not in (*ADAPTIVE, *FIXED, *SCIPY):
        raise unknown("method", method, (*ADAPTIVE, *FIXED, *SCIPY))
    if method in FIXED and (steps is None or steps < 1):
        raise ValueError(f"method {method!r} takes fixed steps: give steps >= 1, got {steps}")
    if method not in FIXED and steps is not None:
        raise ValueError(f"method {method!r} chooses its own steps: give rtol and atol, not steps")


def integrate(
    flow: Flow, y: Tensor, method: str, rtol: float, atol: float, steps: int | None
) -> tuple[float, Tensor, str]:
    """Integrates ``y (B, D + k)`` from ``s = 0`` to 1.

    Returns:
        Where it ended, the state there, and why it stopped before 1 (else an empty string).
    """
    flow.at = (0.0, y)
    solve = _scipy if method in SCIPY else _torchdiffeq
    try:
        return 1.0, solve(flow, y, method, rtol, atol, steps), ""
    except Halt as halt:
        return *flow.at, str(halt)
    except AssertionError as error:  # this is how torchdiffeq gives up
        if not str(error).startswith(("underflow in dt", "non-finite values")):
            raise
        return *flow.at, f"the step size fell below what rtol={rtol:g}, atol={atol:g} can use"


def _torchdiffeq(
    flow: Flow, y: Tensor, method: str, rtol: float, atol: float, steps: int | None
) -> Tensor:
    from torchdiffeq import odeint

    # MPS has no float64; elsewhere time is kept in it whatever the state's dtype.
    dtype = torch.float32 if y.device.type == "mps" else torch.float64
    span = torch.tensor([0.0, 1.0], dtype=dtype, device=y.device)
    if method in FIXED:
        grid = torch.linspace(0, 1, (steps or 1) + 1, dtype=dtype, device=y.device)
        options: dict[str, Any] = {"grid_constructor": lambda *_: grid}
    else:
        options = {"norm": flow.norm, "step_t": span[-1:], "first_step": flow.path.first_step}
        options["dtype"] = dtype
    return odeint(flow, y, span, rtol=rtol, atol=atol, method=method, options=options)[-1]


def _scipy(
    flow: Flow, y: Tensor, method: str, rtol: float, atol: float, steps: int | None
) -> Tensor:
    """SciPy's solver on the flattened batch in float64, under one error norm as in score_sde."""
    from scipy import integrate as scipy_integrate

    def to_state(flat: object) -> Tensor:
        return torch.as_tensor(flat).reshape(y.shape).to(y)

    solver = getattr(scipy_integrate, SCIPY[method])(
        lambda s, flat: flow(s, to_state(flat)).flatten().double().cpu().numpy(),
        0.0,
        y.flatten().double().cpu().numpy(),
        1.0,
        rtol=rtol,
        atol=atol,
        first_step=flow.path.first_step,
    )
    while solver.status == "running":
        flow.callback_step(solver.t, to_state(solver.y), 0.0)
        reason = solver.step()
        if solver.status == "failed":
            raise Halt(str(reason))
    return to_state(solver.y)
