"""A few random directions of an item are measured: compressed sensing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..noise import KeyedNoise
from .linear import Linear
from .shapes import item_shape


@dataclass(frozen=True, eq=False)
class RandomProjection(Linear):
    """``A x`` for ``count`` random directions: orthonormal rows, or Gaussian ones.

    Args:
        shape: of an item of ``D`` numbers.
        count: how many numbers are measured, at most ``D`` for orthonormal rows.
        seed: of the directions.
        orthonormal: rows ``A A^T = I``, uniform among all such; otherwise entries are
            ``N(0, 1 / count)``, so that ``E |A x|^2 = |x|^2``.

    Raises:
        ValueError: for a number of directions that does not fit.
    """

    matrix: Tensor = field(init=False, repr=False)
    shape: tuple[int, ...]
    count: int = 16
    seed: int = 0
    orthonormal: bool = True

    def __post_init__(self) -> None:
        shape = item_shape(self.shape, "a random projection")
        size = math.prod(shape)
        if self.count < 1 or (self.orthonormal and self.count > size):
            raise ValueError(
                f"a random projection of items of shape {shape} has 1 to {size} directions, "
                f"got {self.count}"
            )
        rows = KeyedNoise(self.seed).normal((self.count, size), dtype=torch.float64)
        if self.orthonormal:
            q, r = torch.linalg.qr(rows.T)
            rows = (q * r.diagonal().sign()).T  # the signs make it uniform
        else:
            rows = rows / math.sqrt(self.count)
        object.__setattr__(self, "matrix", rows)
        super().__post_init__()
