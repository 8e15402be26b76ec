"""The right-hand side that a likelihood integrates: the flow, and the divergences beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..path import Path
from ..sde.base import select

Divergence = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(f(z), div f (b, k))`` of a field at ``z``, for the given rows of the batch."""


class Flow:
    """Right-hand side of the ODE for the state ``y = (z, delta/D)`` of shape ``(B, D + k)``.

    ``k`` is the number of separate estimates of the divergence. ``nfe`` counts calls.

    Args:
        score: the score.
        path: the way.
        divergence: the estimator.
        shape: shape ``(B, *shape)`` of the batch.
        cond: further arguments of the score, tensors with one value a sample.
    """

    def __init__(
        self,
        score: Any,
        path: Path,
        divergence: Divergence,
        shape: tuple[int, ...],
        cond: dict[str, Any],
    ) -> None:
        self.path, self.shape, self.nfe = path, shape, 0
        self.dims = math.prod(shape[1:])
        self._score, self._divergence, self._cond = score, divergence, cond

    def __call__(self, s: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """``dy/ds`` at ``s (b,)`` or ``()`` of the given rows; one evaluation of the score."""
        self.nfe += 1
        z = y[:, : self.dims].reshape(-1, *self.shape[1:])
        point = self.path(s)
        p, flat = point.beside(z), point.beside(y)
        cond = select(self._cond, rows) if len(rows) < self.shape[0] else self._cond

        def noise(z: Tensor) -> Tensor:
            return -p.sigma * self._score(z / p.scale, p.t, **cond)

        eps, div = self._divergence(noise, z, rows)
        moved, grown = p.velocity(eps, z), flat.velocity(div / self.dims, 1.0)
        return torch.cat([moved.flatten(1), grown], 1).to(y.dtype)

    def norm(self, y: Tensor) -> Tensor:
        """Size of each row, ``(b,)``: RMS of its state, or its largest divergence if larger."""
        z, deltas = y[:, : self.dims], y[:, self.dims :]
        return torch.maximum(z.square().mean(1).sqrt(), deltas.abs().amax(1))
