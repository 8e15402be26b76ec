r"""Maps that are one matrix an axis: ``A = A_1 (x) A_2 (x) ...``, a Kronecker product.

The decomposition is that of each axis, ``A_i = U_i S_i V_i^T``: a map of a 256 x 256 picture needs
matrices of 256 x 256 at most. Axes of an item after the first, its channels, are spatial; a vector
is one spatial axis.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .operator import Operator, Spectrum, resolved
from .shapes import item_shape, spatial_axes

Matrices = tuple[Tensor | None, ...]
"""One matrix ``(m_i, n_i)`` an axis of an item; None for the identity."""


def along(x: Tensor, matrices: Matrices, transposed: bool = False) -> Tensor:
    """Each matrix applied to its axis of ``x``, ``(B, n_1, n_2, ...)``."""
    for axis, matrix in enumerate(matrices, 1):
        if matrix is not None:
            x = (x.movedim(axis, -1) @ (matrix if transposed else matrix.T)).movedim(-1, axis)
    return x


class Separable(Operator):
    """Base of maps that are a product of one matrix an axis: a subclass gives ``matrices``."""

    shape: tuple[int, ...]

    @abstractmethod
    def matrices(self) -> Matrices:
        """One matrix an axis of an item, float64, None for the identity."""

    @property
    def out(self) -> tuple[int, ...]:
        """The rows of the matrices."""
        pairs = zip(self._factors(None), self.shape, strict=True)
        return tuple(n if m is None else m.shape[0] for m, n in pairs)

    def _factors(self, like: Tensor | None) -> Matrices:
        return self._kept("matrices", lambda _: self.matrices(), like)

    def __call__(self, x: Tensor) -> Tensor:
        """The matrices applied to their axes."""
        return along(self.items(x), self._factors(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """The transposed matrices applied to their axes."""
        return along(self.measurements(y), self._factors(y), transposed=True)

    def spectrum(self, like: Tensor | None = None) -> Spectrum:
        """Products of the singular values of the axes; coefficients have the shape of an item."""
        count = len(self.shape)
        kept = self._kept("spectrum", self._decomposed, like)
        left, right, values, seen = kept[:count], kept[count : 2 * count], kept[-3], kept[-2]
        return Spectrum(
            values=values,
            to=lambda x: along(self.items(x), right),
            back=lambda c: along(self.items(c), right, transposed=True),
            measured=lambda y: seen * along(self.measurements(y), left, transposed=True),
            measurement=lambda c: along(seen * self.items(c), left),
            onto=kept[-1],
        )

    def _decomposed(self, dtype: torch.dtype) -> tuple[Tensor | bool | None, ...]:
        """Left factors ``(m_i, n_i)``, ``V_i^T``, values, where they are > 0, whether onto."""
        lefts: list[Tensor | None] = []
        rights: list[Tensor | None] = []
        values = torch.ones((1,) * len(self.shape)).double()
        for axis, matrix in enumerate(self.matrices()):
            if matrix is None:
                lefts.append(None)
                rights.append(None)
                continue
            rows, columns = matrix.shape
            u, s, right = torch.linalg.svd(matrix, full_matrices=True)
            left, padded = torch.zeros(rows, columns).double(), torch.zeros(columns).double()
            left[:, : len(s)], padded[: len(s)] = u[:, : len(s)], s
            lefts.append(left)
            rights.append(right)
            values = values * padded.reshape(-1, *(1,) * (len(self.shape) - axis - 1))
        values = resolved(values, dtype)
        rank = int((values > 0).sum()) * (math.prod(self.shape) // values.numel())
        return *lefts, *rights, values, (values > 0).double(), rank == math.prod(self.out)


def over_space(shape: tuple[int, ...], matrix: Callable[[int], Tensor]) -> Matrices:
    """``matrix(n)`` for each spatial axis of size ``n``, the identity for channels."""
    axes = spatial_axes(shape)
    return tuple(matrix(n) if i in axes else None for i, n in enumerate(shape))


def _divided(shape: tuple[int, ...], factor: int, what: str) -> tuple[int, ...]:
    shape = item_shape(shape, what)
    if factor < 1 or any(shape[i] % factor for i in spatial_axes(shape)):
        raise ValueError(
            f"the factor of {what} divides the spatial sizes of an item of shape {shape}, "
            f"got {factor}"
        )
    return shape


@dataclass(frozen=True, eq=False)
class AveragePool(Separable):
    """Means of blocks of ``factor`` entries a spatial axis: super-resolution of box pixels.

    Args:
        shape: of an item; its spatial sizes are multiples of the factor.
        factor: down-sampling of each spatial axis.

    Raises:
        ValueError: for a factor that does not divide the sizes.
    """

    shape: tuple[int, ...]
    factor: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _divided(self.shape, self.factor, "average pooling"))

    def matrices(self) -> Matrices:
        """Rows of ``factor`` equal weights."""

        def means(n: int) -> Tensor:
            eye = torch.eye(n // self.factor, dtype=torch.float64)
            return eye.repeat_interleave(self.factor, 1) / self.factor

        return over_space(self.shape, means)


@dataclass(frozen=True, eq=False)
class Bicubic(Separable):
    """Down-sampling by Keys' cubic kernel, stretched by the factor so that nothing aliases.

    The kernel is ``(a+2)|u|^3 - (a+3)|u|^2 + 1`` for ``|u| <= 1`` and
    ``a|u|^3 - 5a|u|^2 + 8a|u| - 4a`` for ``1 < |u| < 2``, of ``u`` = distance / factor; at the
    borders it is cut off and its weights sum to one again. With ``a = -0.5`` it is the antialiased
    bicubic down-sampling of Pillow and of PyTorch.

    Args:
        shape: of an item; its spatial sizes are multiples of the factor.
        factor: down-sampling of each spatial axis.
        a: of the kernel, -0.5 (Keys) or -0.75 are usual.

    Raises:
        ValueError: for a factor that does not divide the sizes.

    Source: Cubic convolution interpolation for digital image processing (Keys, 1981),
    https://doi.org/10.1109/TASSP.1981.1163711.
    """

    shape: tuple[int, ...]
    factor: int = 4
    a: float = -0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _divided(self.shape, self.factor, "bicubic"))

    def matrices(self) -> Matrices:
        """Weights of the kernel at the centres of the small pixels."""
        return over_space(self.shape, self._weights)

    def _weights(self, n: int) -> Tensor:
        centre = (torch.arange(n // self.factor).double() + 0.5) * self.factor
        u = (((torch.arange(n) + 0.5) - centre[:, None]) / self.factor).abs()
        near = (self.a + 2) * u**3 - (self.a + 3) * u**2 + 1
        far = self.a * (u**3 - 5 * u**2 + 8 * u - 4)
        weights = torch.where(u <= 1, near, torch.where(u < 2, far, 0))
        return weights / weights.sum(1, keepdim=True)


@dataclass(frozen=True, eq=False)
class Blur(Separable):
    """A Gaussian blur of every spatial axis, by weights cut off at 4 standard deviations.

    Args:
        shape: of an item.
        std: of the Gaussian, in entries, > 0.
        boundary: what lies beyond an item: ``reflect``, its mirror image with the edge repeated;
            ``zeros``; or ``circular``, its other end.

    Raises:
        ValueError: for a std that is not positive or an unknown boundary.
    """

    shape: tuple[int, ...]
    std: float = 2.0
    boundary: Literal["reflect", "zeros", "circular"] = "reflect"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", item_shape(self.shape, "a blur"))
        if not 0 < self.std < math.inf:
            raise ValueError(f"the std of a blur is > 0, in entries, got {self.std}")
        if self.boundary not in ("reflect", "zeros", "circular"):
            raise ValueError(
                f"the boundary of a blur is reflect, zeros or circular, got {self.boundary!r}"
            )

    def matrices(self) -> Matrices:
        """The weights of the Gaussian, those beyond the ends folded back."""
        return over_space(self.shape, self._weights)

    def _weights(self, n: int) -> Tensor:
        radius = max(1, int(4 * self.std + 0.5))
        step = torch.arange(-radius, radius + 1)
        weights = (-0.5 * (step.double() / self.std) ** 2).exp()
        weights = weights / weights.sum()
        row = torch.arange(n)[:, None].expand(n, len(step))
        column = row + step
        inside = (column >= 0) & (column < n)
        if self.boundary == "circular":
            column = column % n
        else:
            column = column % (2 * n)
            column = torch.where(column < n, column, 2 * n - 1 - column)
        weights = weights.expand(n, -1)
        if self.boundary == "zeros":
            weights = weights * inside
        matrix = torch.zeros(n, n, dtype=torch.float64)
        return matrix.index_put((row, column), weights, accumulate=True)
