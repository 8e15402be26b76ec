"""Any matrix as an operator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .operator import Operator, Spectrum, resolved
from .shapes import item_shape


@dataclass(frozen=True, eq=False)
class Linear(Operator):
    """``A x`` for a matrix, which is kept whole; ``D x D`` numbers are never made if ``M < D``.

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
        """By the decomposition of the matrix; coefficients are ``(B, D)``, the measured first."""
        left, values, right, reflectors, middle, onto = self._kept(
            "spectrum", self._decomposed, like
        )
        size, rank = self.matrix.shape[1], right.shape[0]

        def to(x: Tensor) -> Tensor:
            x = self.items(x).flatten(1)
            x = x - ((x @ reflectors) @ middle) @ reflectors.T
            return torch.cat([x[:, :rank] @ right.T, x[:, rank:]], 1)

        def back(c: Tensor) -> Tensor:
            c = torch.cat([c[:, :rank] @ right, c[:, rank:]], 1)
            return (c - ((c @ reflectors) @ middle.T) @ reflectors.T).reshape(-1, *self.shape)

        def measured(y: Tensor) -> Tensor:
            c = self.measurements(y) @ left
            return torch.cat([c, c.new_zeros(len(c), size - rank)], 1)

        return Spectrum(
            values=values,
            to=to,
            back=back,
            measured=measured,
            measurement=lambda c: c[:, :rank] @ left.T,
            onto=onto,
        )

    def _decomposed(
        self, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, bool]:
        """``U``, all ``D`` values, ``V^T`` of the first ``k = min(M, D)``; ``Y``, ``T``; onto.

        With ``M < D``, ``A^T = Q R`` by Householder's reflections, ``Q = I - Y T Y^T`` of all
        ``D`` columns, and ``R^T = U S W^T``: then ``V = Q diag(W, I)``.
        """
        rows, columns = self.matrix.shape
        if rows < columns:
            packed, tau = torch.geqrf(self.matrix.T)
            y = packed.tril(-1)
            y.diagonal().fill_(1)
            # T^{-1} = diag(1 / tau) + strict upper part of Y^T Y; tau may be zero.
            system = torch.eye(rows).double() + tau[:, None] * (y.T @ y).triu(1)
            middle = torch.linalg.solve_triangular(system, tau.diag(), upper=True)
            triangle = packed[:rows].triu().T
        else:
            y, middle = torch.zeros(columns, 0).double(), torch.zeros(0, 0).double()
            triangle = self.matrix
        u, s, right = torch.linalg.svd(triangle, full_matrices=False)
        s = resolved(s, dtype)
        values = torch.cat([s, s.new_zeros(columns - len(s))])
        return u * (s > 0), values, right, y, middle, int((s > 0).sum()) == rows
