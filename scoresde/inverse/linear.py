"""Any matrix as an operator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .operator import Operator, Spectrum, item_shape, resolved


@dataclass(frozen=True, eq=False)
class Linear(Operator):
    """``A x`` for a matrix, kept whole: for items of some thousand numbers at most.

    Args:
        matrix: ``(M, D)``.
        shape: of an item, whose numbers are the ``D`` columns in order; ``(D,)`` without it.

    Raises:
        ValueError: for no matrix, or a shape of another number of numbers.
    """

    matrix: Tensor
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        matrix = torch.as_tensor(self.matrix).detach().to("cpu", torch.float64)
        if matrix.ndim != 2 or not matrix.numel() or not bool(matrix.isfinite().all()):
            raise ValueError(
                f"the matrix of an operator is (M, D) and finite, got {tuple(matrix.shape)}"
            )
        shape = item_shape(self.shape or matrix.shape[1:], "an operator")
        if math.prod(shape) != matrix.shape[1]:
            raise ValueError(
                f"a matrix of {matrix.shape[1]} columns does not fit items of shape {shape}"
            )
        object.__setattr__(self, "matrix", matrix)
        object.__setattr__(self, "shape", shape)

    @property
    def out(self) -> tuple[int, ...]:
        """``(M,)``."""
        return (self.matrix.shape[0],)

    def __call__(self, x: Tensor) -> Tensor:
        """``A x``, ``(B, M)``."""
        return self.items(x).flatten(1) @ self._kept("matrix", lambda _: self.matrix, x).T

    def adjoint(self, y: Tensor) -> Tensor:
        """``A^T y``, ``(B, *shape)``."""
        matrix = self._kept("matrix", lambda _: self.matrix, y)
        return (self.measurements(y) @ matrix).reshape(-1, *self.shape)

    def spectrum(self, like: Tensor | None = None) -> Spectrum:
        """By the decomposition of the matrix; coefficients are ``(B, D)``."""
        left, values, right, onto = self._kept("spectrum", self._decomposed, like)
        return Spectrum(
            values=values,
            to=lambda x: self.items(x).flatten(1) @ right.T,
            back=lambda c: (c @ right).reshape(-1, *self.shape),
            measured=lambda y: self.measurements(y) @ left,
            measurement=lambda c: c @ left.T,
            onto=onto,
        )

    def _decomposed(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, bool]:
        rows, columns = self.matrix.shape
        u, s, right = torch.linalg.svd(self.matrix, full_matrices=True)
        values, left = torch.zeros(columns).double(), torch.zeros(rows, columns).double()
        values[: len(s)] = resolved(s, dtype) if len(s) else s
        left[:, : len(s)] = u[:, : len(s)]
        left = left * (values > 0)
        return left, values, right, int((values > 0).sum()) == rows
