r"""The gradient of a likelihood by the adjoint ODE: nothing is kept but the latent.

For ``dy/ds = F(s, y; theta)`` from ``s = 0`` to 1 and a loss whose gradient at the end is ``a(1)``

    da/ds = -(dF/dy)^T a,    d/d theta = int_0^1 (dF/d theta)^T a ds

are solved back to ``s = 0``, where ``a`` is the gradient in the data, beside ``y`` itself. That is
the gradient of the exact integral, to the tolerances of this second solve, whatever solved the
first: with long steps, not that of the number computed. What it is to the parameters is summed
along, and does not choose the steps, on which it has no effect.

Sources: Neural Ordinary Differential Equations (Chen et al., 2018),
https://arxiv.org/abs/1806.07366; "Hey, that's not an ODE": Faster ODE Adjoints via Seminorms
(Kidger et al., 2021), https://arxiv.org/abs/2009.09457.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..path import Path
from ..precision import FLOOR, widest
from .field import Flow
from .integrate import FIXED, TORCHDIFFEQ, Carried
from .recompute import Bearing, differentiable, products
from .solve import Problem, Way, solve


def adjoint_solve(problem: Problem, way: Way, probes: Tensor | None, bearing: Bearing) -> Carried:
    """What :func:`~scoresde.likelihood.solve.solve` finds, its gradient by the adjoint ODE.

    It is solved by the same fixed steps, or the same method of torchdiffeq, and by torchdiffeq's
    ``dopri5`` to the same tolerances where the way forth was of another kind. Its probes keep
    their signs, which along a grid turn: there the gradient is that of another estimate, of the
    same mean.
    """
    box: list[Carried] = []
    latent, deltas = _Adjoint.apply(
        problem, way, probes, bearing, box, problem.x, *bearing.tensors
    )
    return box[0]._replace(latent=latent, deltas=deltas)


class _Adjoint(torch.autograd.Function):
    """The whole solve as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, way: Way, probes: Tensor | None, bearing: Bearing,
        box: list[Carried], x: Tensor, *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        done = solve(problem, way, probes).carried
        box.append(done)
        ctx.problem, ctx.way, ctx.probes, ctx.bearing = problem, way, probes, bearing
        arrived = torch.ones(len(x), dtype=torch.bool, device=x.device)
        arrived[list(done.failures)] = False
        ctx.save_for_backward(done.latent, arrived.nonzero()[:, 0], *tensors)
        return done.latent.clone(), done.deltas.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, latent_grad: Tensor, deltas_grad: Tensor) -> tuple[Tensor | None, ...]:
        latent, rows, *tensors = ctx.saved_tensors
        problem = ctx.problem
        path = Path(problem.score.sde, problem.t_min, problem.t_max)
        first, last = float(path(0.0).scale), float(path(1.0).scale)
        z = latent[rows].flatten(1) * last
        a = latent_grad[rows].flatten(1) / last
        # The state holds deltas/D.
        fixed = deltas_grad[rows] * z.shape[1]
        size = max(float(a.abs().amax()), float(fixed.abs().amax())) if len(rows) else 0.0
        grads: list[Tensor] = [torch.zeros_like(t) for t in tensors]
        x_grad = torch.zeros_like(latent)
        if size > 0:  # linear in the gradient: tolerances are of one of size one
            back = _Back(ctx, path, rows, tensors, fixed / size)
            a, *found = back.solve(z, a / size)
            grads = [g * size for g in found]
            x_grad[rows] = (a * size * first).reshape(-1, *latent.shape[1:])
        return (None, None, None, None, None, x_grad, *grads)


class _Back:
    """The adjoint ODE of the rows that have arrived."""

    def __init__(
        self, ctx: Any, path: Path, rows: Tensor, tensors: list[Tensor], fixed: Tensor
    ) -> None:
        self.problem, self.way, self.bearing = ctx.problem, ctx.way, ctx.bearing
        self.path, self.rows, self.tensors, self.fixed = path, rows, tensors, fixed
        self.divergence = differentiable(ctx.probes)

    def __call__(self, s: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Derivatives of ``(z, a, gradients)``."""
        # Beside parameters of a wider dtype torchdiffeq keeps the state in theirs.
        z, a = (part.to(self.fixed) for part in state[:2])
        shape = tuple(self.problem.x.shape)
        with self.bearing.twice():
            z = z.detach().requires_grad_()
            cond, others = self.bearing.fresh(self.tensors)
            flow = Flow(self.problem.score, self.path, self.divergence, shape, cond)
            y = torch.cat([z, torch.zeros_like(self.fixed)], 1)
            out = flow(s.detach().cpu().double(), y, self.rows)
            found = products([out], [torch.cat([a, self.fixed], 1)], [z, *others])
        moved = out.detach()[:, : z.shape[1]]
        zeros = (z, *self.tensors)
        back = [
            torch.zeros_like(o) if f is None else -f for f, o in zip(found, zeros, strict=True)
        ]
        return (moved, *back)

    def norm(self, state: tuple[Tensor, ...]) -> Tensor:
        """RMS of the state or of ``a``, of the worst row."""
        return torch.stack([part.square().mean(1).sqrt().max() for part in state[:2]]).max()

    def solve(self, z: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        """``(a, gradients)`` at ``s = 0``."""
        from torchdiffeq import odeint

        dtype = widest(z.device)
        span = torch.tensor([1.0, 0.0], dtype=dtype, device=z.device)
        method, steps = self.way.method, self.way.steps
        if method in FIXED:
            grid = torch.linspace(1, 0, (steps or 1) + 1, dtype=dtype, device=z.device)
            options: dict[str, Any] = {"grid_constructor": lambda *_: grid}
        else:
            options = {
                "norm": self.norm, "step_t": span[-1:], "first_step": self.path.first_step,
                "dtype": dtype,
            }  # fmt: skip
            named = isinstance(method, str) and method in TORCHDIFFEQ
            method = method.removeprefix("torchdiffeq-") if named else "dopri5"
        floor = FLOOR[z.dtype]
        state = (z, a, *(torch.zeros_like(t) for t in self.tensors))
        out = odeint(
            self, state, span, rtol=max(self.way.rtol, floor), atol=max(self.way.atol, floor),
            method=method, options=options,
        )  # fmt: skip
        return tuple(part[-1] for part in out[1:])
