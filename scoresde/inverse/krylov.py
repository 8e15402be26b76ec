r"""Linear systems of an operator by conjugate gradients, each sample for itself, differentiable.

What an operator without a spectrum is solved by: only products with ``A`` and ``A^T`` are asked
for. A sample that has converged stays where it is, so that its result is independent of the batch;
gradients come from the system itself (the derivative of ``K^{-1} r`` is another solve), not from
its iterations.

Source: Methods of conjugate gradients for solving linear systems (Hestenes and Stiefel, 1952),
https://doi.org/10.6028/jres.049.044.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""A linear map of a batch."""
ASKED = 8
"""Iterations between two looks at whether all samples have converged: a look stops the device."""


def dot(x: Tensor, y: Tensor) -> Tensor:
    """``<x, y>`` of each sample, ``(B, 1, ..., 1)``."""
    return (x * y).flatten(1).sum(1).reshape(-1, *(1,) * (x.ndim - 1))


def tolerance(dtype: torch.dtype) -> float:
    """Residual, relative to the right-hand side, at which a sample has converged."""
    return 10 * torch.finfo(dtype).eps


def _ratio(live: Tensor, over: Tensor, under: Tensor) -> Tensor:
    live = live & (under > 0)
    return torch.where(live, over / torch.where(live, under, 1), 0)


def conjugate_gradients(product: Product, r: Tensor, limit: int) -> Tensor:
    """``K^{-1} r`` for a symmetric positive ``K``.

    Args:
        product: ``v -> K v`` for a batch of the shape of ``r``.
        r: ``(B, ...)``.
        limit: largest number of products.
    """
    z, p = torch.zeros_like(r), r
    square = dot(r, r)
    enough = tolerance(r.dtype) ** 2 * square
    for i in range(limit):
        live = square > enough
        if i % ASKED == 0 and not bool(live.any()):
            break
        image = product(p)
        step = _ratio(live, square, dot(p, image))
        z, r = z + step * p, r - step * image
        new = torch.where(live, dot(r, r), square)
        p, square = r + _ratio(live, new, square) * p, new
    return z


def least_squares(forward: Product, adjoint: Product, y: Tensor, limit: int) -> Tensor:
    """``A^+ y``: of all items with least ``|A x - y|``, the smallest.

    Args:
        forward: ``x -> A x``.
        adjoint: ``y -> A^T y``.
        y: ``(B, *out)``.
        limit: largest number of products with ``A``.
    """
    p = adjoint(y)
    x, square = torch.zeros_like(p), dot(p, p)
    enough = tolerance(y.dtype) ** 2 * square
    for i in range(limit):
        live = square > enough
        if i % ASKED == 0 and not bool(live.any()):
            break
        image = forward(p)
        step = _ratio(live, square, dot(image, image))
        x, y = x + step * p, y - step * image
        s = adjoint(y)
        new = torch.where(live, dot(s, s), square)
        p, square = s + _ratio(live, new, square) * p, new
    return x


def largest(product: Product, x: Tensor, limit: int = 60) -> float:
    """The largest eigenvalue of a symmetric map >= 0, by Lanczos' method.

    Without orthogonalisation against all that came before, eigenvalues come repeatedly, but they
    are right.

    Args:
        product: ``v -> K v``.
        x: ``(1, ...)``, where to start.
        limit: largest number of products.
    """
    diagonal: list[float] = []
    beside: list[float] = []
    found, last, before, link = 0.0, -1.0, torch.zeros_like(x), 0.0
    x = x / x.norm()
    while len(diagonal) < limit and abs(found - last) > 1e-12 * found:
        image = product(x) - link * before
        diagonal.append(float(dot(image, x)))
        image = image - diagonal[-1] * x
        link = float(image.norm())
        matrix = torch.tensor(diagonal).double().diag()
        if beside:
            matrix = matrix + torch.tensor(beside).double().diag(1)
        found, last = float(torch.linalg.eigvalsh(matrix, UPLO="U").max()), found
        if link <= 1e-14 * found:  # nothing is left to find from here
            break
        beside.append(link)
        before, x = x, image / link
    return max(found, 0.0)


class PseudoInverse(torch.autograd.Function):
    """``A^+ y``, or ``(A^T)^+ x`` where transposed; each is the other's derivative."""

    @staticmethod
    def forward(ctx: Any, operator: Any, y: Tensor, transposed: bool) -> Tensor:
        """``(B, *out)`` to ``(B, *shape)``, or back."""
        ctx.operator, ctx.transposed = operator, transposed
        maps = (operator.adjoint, operator) if transposed else (operator, operator.adjoint)
        return least_squares(*maps, y, operator.iterations).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        """The transpose of the pseudo-inverse."""
        return None, PseudoInverse.apply(ctx.operator, grad, not ctx.transposed), None


class Solve(torch.autograd.Function):
    """``(a I + b A A^T)^{-1} r`` for ``a > 0``."""

    @staticmethod
    def forward(ctx: Any, operator: Any, r: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """``a`` and ``b`` broadcast with ``r``, ``(B, *out)``."""

        def product(v: Tensor) -> Tensor:
            return a * v + b * operator(operator.adjoint(v))

        z = conjugate_gradients(product, r, operator.iterations).detach()
        ctx.operator = operator
        ctx.save_for_backward(a, b, z)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        """``w = K^{-1} grad``; then ``dr = w``, ``da = -<w, z>``, ``db = -<A^T w, A^T z>``."""
        a, b, z = ctx.saved_tensors
        w = Solve.apply(ctx.operator, grad, a, b)
        da = db = None
        if ctx.needs_input_grad[2]:
            da = (-dot(w, z)).sum_to_size(a.shape)
        if ctx.needs_input_grad[3]:
            adjoint = ctx.operator.adjoint
            db = (-dot(adjoint(w), adjoint(z)).reshape(-1, *(1,) * (z.ndim - 1))).sum_to_size(
                b.shape
            )
        return None, w, da, db


def solve(operator: Any, r: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``(a I + b A A^T)^{-1} r``; where ``a`` is zero, its pseudo-inverse."""
    zero = a == 0
    if not bool(zero.any()):
        return Solve.apply(operator, r, a, b)
    inverse = PseudoInverse.apply(operator, PseudoInverse.apply(operator, r, False), True) / b
    if bool(zero.all()):
        return inverse
    return torch.where(zero, inverse, Solve.apply(operator, r, torch.where(zero, 1, a), b))
