"""Some entries of an item are known, the others are not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .operator import Operator, Spectrum
from .shapes import item_shape


@dataclass(frozen=True, eq=False)
class Mask(Operator):
    """``A x = mask * x``, of the shape of an item, with zeros where nothing is known.

    Args:
        mask: 1 (or True) where an entry is known, 0 where not; of the shape of an item.
        shape: of an item, with which the mask broadcasts, such as ``(3, 64, 64)`` for a mask
            ``(1, 64, 64)``; that of the mask without it.

    Raises:
        ValueError: for other values than 0 and 1, a shape that does not fit, or nothing known.
    """

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

    def __call__(self, x: Tensor) -> Tensor:
        """The known entries, zeros elsewhere."""
        return self.seen(self.items(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """The known entries, zeros elsewhere: ``A^T = A``."""
        return self.seen(self.measurements(y))

    def seen(self, y: Tensor) -> Tensor:
        """``y`` with zeros where nothing is known."""
        # Not a product: what is no number where nothing is known has no say.
        known = self._kept("known", lambda _: self.mask, y) > 0
        return torch.where(known, y, 0)

    def spectrum(self, like: Tensor | None = None) -> Spectrum:
        """Values of 0 and 1; coefficients are the entries themselves."""
        known = self._kept("known", lambda _: self.mask, like)
        return Spectrum(known, self.items, self.measurements, self.adjoint, self.adjoint)


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
