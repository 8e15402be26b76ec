r"""The system of a measurement, by preconditioned conjugate gradients, each sample on its own.

    (a I + A C A^T) w = r,    preconditioned by (a I + b A A^T)^{-1}

``C`` is known by its products alone, of which each may cost a way back through a network: the
iterations are few, their number is fixed, and what they have made of ``C A^T w`` on the way is
kept. Gradients pass through the iterations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .measured import beside


def solved(
    operator: Any,
    spread: Callable[[Tensor], Tensor],
    r: Tensor,
    a: float,
    b: Tensor,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """``w``, of the shape of ``r``, and ``C A^T w``, of that of an item, from ``w = 0``.

    A sample stops where it has converged, or where a ``C`` that is no covariance (a network's
    need not be) shows no positive curvature: what it has reached by then is kept.

    Args:
        operator: ``A``.
        spread: ``v -> C v`` on items ``(B, *shape)``; called once an iteration.
        r: ``(B, *operator.out)``.
        a: variance of the noise, >= 0.
        b: variance of the data that the preconditioner takes, > 0, ``()`` or ``(B, 1, ...)``.
        iterations: >= 1.
    """
    p = operator.solve(r, a, b)
    rho = first = dot(r, p)
    small = torch.finfo(r.dtype).eps ** 2
    w, total = torch.zeros_like(r), None
    for i in range(iterations):
        back = spread(operator.adjoint(p))
        image = operator(back)
        own = dot(p, image)
        image = image + a * p
        curvature = own + a * dot(p, p)
        alive = (own > 0) & (rho > small * first)
        step = torch.where(alive, rho, 0) / torch.where(alive, curvature, 1)
        w = w + beside(step, p) * p
        change = beside(step, back) * back
        total = change if total is None else total + change
        if i + 1 == iterations:
            break
        r = r - beside(step, r) * image
        z = operator.solve(r, a, b)
        new = torch.where(alive, dot(r, z), 0)  # what has stopped does not start again
        p = z + beside(new / torch.where(alive, rho, 1), p) * p
        rho = new
    assert total is not None
    return w, total


def scaled(
    operator: Any,
    spread: Callable[[Tensor], Tensor],
    w: Tensor,
    r: Tensor,
    a: float,
    reach: float = 1.0,
    full: float = math.inf,
) -> Tensor:
    """``C A^T w`` times ``min(full, reach c)``, with the ``c`` that is best along ``w``.

        c = <w, r> / <w, (a I + A C A^T) w>

    which is 1 where ``w`` solves the system, and 0 where ``C`` shows no positive curvature. It
    costs one product.
    """
    back = spread(operator.adjoint(w))
    own = dot(w, operator(back))
    alive = own > 0
    c = torch.where(alive, dot(w, r), 0) / torch.where(alive, own + a * dot(w, w), 1)
    full = min(full, torch.finfo(c.dtype).max)  # noise may be next to none
    return beside((reach * c).clamp_max(full), back) * back


def reach_of(steps: int) -> float:
    """How many times its best length a pull may have, by the number of steps.

    Pulls beyond their best commit the state to the measurement early, as the published steps do,
    which comes much closer to posteriors of several modes; but a step that goes too far goes
    further each time, and shorter steps bear longer pulls. From mixtures: 2 for few steps, an
    eighth of the steps, and 8 where more has brought nothing.
    """
    return min(8.0, max(2.0, steps / 8))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each sample, ``(B,)``."""
    return (a * b).flatten(1).sum(1)
