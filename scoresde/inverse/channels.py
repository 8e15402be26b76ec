"""Mixtures of the channels of an item, the same at every place: colour to grey."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .separable import Matrices, Separable
from .shapes import item_shape

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luma of ITU-R BT.601."""


@dataclass(frozen=True, eq=False)
class Channels(Separable):
    """``y_j = sum_i matrix_ji x_i`` over channels ``x_i``, at every place.

    Args:
        shape: of an item, ``(C, ...)``.
        matrix: ``(C', C)``.

    Raises:
        ValueError: for a matrix that does not fit the channels.
    """

    shape: tuple[int, ...]
    matrix: Tensor

    def __post_init__(self) -> None:
        shape = item_shape(self.shape, "a mixture of channels")
        matrix = torch.as_tensor(self.matrix).detach().to("cpu", torch.float64)
        if matrix.ndim != 2 or not matrix.numel() or matrix.shape[1] != shape[0]:
            raise ValueError(
                f"the matrix of channels is (C', {shape[0]}) for items of shape {shape}, "
                f"got {tuple(matrix.shape)}"
            )
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "matrix", matrix)

    def matrices(self) -> Matrices:
        """The matrix for the channels, the identity for space."""
        return self.matrix, *(None,) * (len(self.shape) - 1)


@dataclass(frozen=True, eq=False)
class Grayscale(Separable):
    """A weighted sum of the channels: what colouring starts from.

    Args:
        shape: of an item, ``(C, ...)``.
        weights: ``luma``, for red, green and blue; ``equal``, the mean of any number of channels;
            or one number a channel.

    Raises:
        ValueError: for weights that do not fit the channels.
    """

    shape: tuple[int, ...]
    weights: Literal["luma", "equal"] | tuple[float, ...] = "luma"

    def __post_init__(self) -> None:
        shape = item_shape(self.shape, "grayscale")
        object.__setattr__(self, "shape", shape)
        row = self._row()
        if len(row) != shape[0] or not any(row):
            raise ValueError(
                f"weights of grayscale are luma (3 channels), equal or one number a channel, "
                f"got {self.weights!r} for items of shape {shape}"
            )

    def _row(self) -> tuple[float, ...]:
        if isinstance(self.weights, str):
            equal = (1 / self.shape[0],) * self.shape[0]
            return {"luma": LUMA, "equal": equal}.get(self.weights, ())
        return tuple(float(w) for w in self.weights)

    def matrices(self) -> Matrices:
        """One row for the channels, the identity for space."""
        row = torch.tensor([self._row()], dtype=torch.float64)
        return row, *(None,) * (len(self.shape) - 1)
