"""Some entries of an item are known, the others are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .operator import Operator, Spectrum, factor, inverse
from .shapes import item_shape


@dataclass(frozen=True, eq=False)
class Selection(Operator):
    """Base of maps that know some of as many numbers as an item has: ``A A^T = diag(mask)``."""

    mask: Tensor
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        mask, shape = known_entries(self.mask, self.shape)
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "shape", shape)

    @property
    def out(self) -> tuple[int, ...]:
        """The shape of an item."""
        return self.shape

    @property
    def count(self) -> int:
        """Number of known entries."""
        return int(self.mask.sum())

    def known(self, like: Tensor | None = None) -> Tensor:
        """The mask in a dtype, on a device."""
        return self._kept("known", lambda _: self.mask, like)

    def seen(self, y: Tensor) -> Tensor:
        """``y`` with zeros where nothing is known."""
        # Not a product: what is no number where nothing is known has no say.
        return torch.where(self.known(y) > 0, y, 0)

    def solve(self, r: Tensor, a: Any, b: Any) -> Tensor:
        """``r / (a + b mask)``; where that is 0, 0."""
        return inverse(factor(a, r) + factor(b, r) * self.known(r)) * self.measurements(r)


@dataclass(frozen=True, eq=False)
class Mask(Selection):
    """``A x = mask * x``, of the shape of an item, with zeros where nothing is known.

    Args:
        mask: 1 (or True) where an entry is known, 0 where not; of the shape of an item.
        shape: of an item, with which the mask broadcasts, such as ``(3, 64, 64)`` for a mask
            ``(1, 64, 64)``; that of the mask without it.

    Raises:
        ValueError: for other values than 0 and 1, a shape that does not fit, or nothing known.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """The known entries, zeros elsewhere."""
        return self.seen(self.items(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """The known entries, zeros elsewhere: ``A^T = A``."""
        return self.seen(self.measurements(y))

    def spectrum(self, like: Tensor | None = None) -> Spectrum:
        """Values of 0 and 1; coefficients are the entries themselves."""
        to, back = self.items, self.measurements
        return Spectrum(self.known(like), to, back, self.adjoint, self.adjoint)


def known_entries(mask: Tensor, shape: tuple[int, ...] = ()) -> tuple[Tensor, tuple[int, ...]]:
    """A mask as booleans of the shape of an item, and that shape.

    Raises:
        ValueError: for other values than 0 and 1, a shape that does not fit, or nothing known.
    """
    mask = torch.as_tensor(mask).detach().cpu()
    shape = item_shape(shape or mask.shape, "a mask")
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("a mask is 1 where an entry is known and 0 where not, got other values")
    try:
        mask = mask.bool().expand(shape).clone()
    except RuntimeError:
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} does not fit items of shape {shape}"
        ) from None
    if not bool(mask.any()):
        raise ValueError("a mask needs a known entry (1), got zeros alone")
    return mask, shape
