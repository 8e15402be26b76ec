"""Any linear function as an operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..noise import KeyedNoise
from .operator import Operator
from .shapes import item_shape

CLOSE = {torch.float32: 1e-3, torch.float64: 1e-8}
"""Largest relative error of a trial that is taken for rounding."""


@dataclass(frozen=True, eq=False, init=False)
class Custom(Operator):
    """``A x = forward(x)``; its adjoint is given, or comes from automatic differentiation.

    Without a spectrum, systems are solved by conjugate gradients. When it is made, the map is
    tried on random items: it has to be linear, each item for itself, and the adjoint its adjoint.

    Args:
        forward: ``(B, *shape)`` to ``(B, *out)``, differentiable by PyTorch unless an adjoint is
            given: then anything may happen in either, such as NumPy.
        shape: of an item.
        adjoint: ``(B, *out)`` to ``(B, *shape)``.
        dtype: of the trial.
        device: of the trial, where the map lives.

    Raises:
        ValueError: for a map that is not linear, mixes items of a batch, or has another adjoint.
    """

    forward: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        shape: tuple[int, ...],
        adjoint: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        shape = item_shape(shape, "a linear function")
        own = {"forward": forward, "shape": shape, "_given": adjoint}
        self.__dict__.update(own, dtype=dtype, device=device)
        self._try_forward()
        self._try_adjoint()

    def _try_forward(self) -> None:
        noise = KeyedNoise(0)
        x, z = (noise.normal((2, *self.shape), *self.home) for _ in range(2))
        with torch.no_grad():
            image = self.forward(x)
            if not isinstance(image, Tensor) or image.ndim < 2 or len(image) != 2:
                found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise ValueError(
                    f"forward maps items {tuple(x.shape)} to a tensor (2, ...), got {found}"
                )
            self.__dict__["_out"] = tuple(image.shape[1:])
            combined = self.forward(2 * x - 3 * z)
            self._close(combined, 2 * image - 3 * self.forward(z), "forward is not linear")
            self._close(self.forward(x[:1]), image[:1], "forward mixes the items of a batch")

    def _close(self, found: Tensor, wanted: Tensor, trouble: str) -> None:
        scale = wanted.abs().max()
        error = (found - wanted).abs().max() if found.shape == wanted.shape else scale + 1
        if not bool(error <= CLOSE.get(self.dtype, 1e-1) * scale):  # also where it is no number
            raise ValueError(f"{trouble}: random items are off by {float(error / scale):.1e}")

    def _try_adjoint(self) -> None:
        y = torch.zeros((2, *self.out), dtype=self.dtype, device=self.device)
        try:
            image = self.adjoint(y)
        except RuntimeError as error:
            if self._given is not None:
                raise
            raise ValueError(
                f"forward cannot be differentiated, give its adjoint: {str(error).splitlines()[0]}"
            ) from error
        if tuple(image.shape) != (2, *self.shape):
            raise ValueError(
                f"the adjoint maps measurements {tuple(y.shape)} to items {(2, *self.shape)}, "
                f"got {tuple(image.shape)}"
            )
        off = self.adjointness()
        if not off <= CLOSE.get(self.dtype, 1e-1):
            raise ValueError(f"the adjoint is not that of forward: they are off by {off:.1e}")

    @property
    def _given(self) -> Callable[[Tensor], Tensor] | None:
        return self.__dict__["_given"]

    @property
    def home(self) -> tuple[torch.device, torch.dtype]:
        """Where and in which dtype the map is tried."""
        return torch.device(self.device), self.dtype

    @property
    def out(self) -> tuple[int, ...]:
        """Shape of what ``forward`` gives for an item."""
        return self.__dict__["_out"]

    def __call__(self, x: Tensor) -> Tensor:
        """``forward(x)``."""
        if self._given is None:
            return self.forward(self.items(x))
        return Product.apply(self.items(x), self.forward, self._given)

    def adjoint(self, y: Tensor) -> Tensor:
        """The adjoint given, or the derivative of ``<forward(x), y>``."""
        back = self._given or self._derivative
        return Product.apply(self.measurements(y), back, self.forward)

    def _derivative(self, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x = torch.zeros((len(y), *self.shape), dtype=y.dtype, device=y.device)
            image = self.forward(x.requires_grad_())
        return torch.autograd.grad(image, x, y)[0]


class Product(torch.autograd.Function):
    """A linear map whose derivative is its adjoint, whatever happens inside of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Any, back: Any) -> Tensor:
        """``there(x)``."""
        ctx.maps = there, back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        """``back(grad)``, itself differentiable."""
        there, back = ctx.maps
        return Product.apply(grad, back, there), None, None
