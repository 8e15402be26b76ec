r"""Circular convolution by any kernel, by the fast Fourier transform.

With ``h`` the transform of the kernel, ``A = F^* diag(h) F``. Write ``h = p |h|`` with phases
``p``. ``|h|`` is even for a real kernel, and even symbols are diagonal in the Hartley transform
``H`` too; ``Q = F^* diag(p) F`` is real and orthogonal. So ``A = (Q H) |h| H`` is a singular value
decomposition in real numbers: ``V = H``, ``U = Q H``, coefficients one a frequency.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .fourier import batch_axes, full, hartley, mirrored
from .operator import Operator, Spectrum, factor, inverse, resolved
from .shapes import item_shape, spatial, spatial_axes


@dataclass(frozen=True, eq=False)
class Convolution(Operator):
    """``(A x)(i) = sum_j kernel(j) x(i - j + c)`` in each channel; what leaves at one end enters
    at the other.

    Args:
        shape: of an item.
        kernel: one axis a spatial axis, no longer than it; its centre ``c`` is at ``size // 2``.

    Raises:
        ValueError: for a kernel that does not fit.
    """

    shape: tuple[int, ...]
    kernel: Tensor

    def __post_init__(self) -> None:
        shape = item_shape(self.shape, "a convolution")
        kernel = torch.as_tensor(self.kernel).detach().to("cpu", torch.float64)
        space = spatial(shape)
        fits = kernel.ndim == len(space) and all(
            1 <= k <= n for k, n in zip(kernel.shape, space, strict=True)
        )
        if not fits or not bool(kernel.isfinite().all()) or not bool((kernel != 0).any()):
            raise ValueError(
                f"the kernel of a convolution is finite, not zero, and no larger than {space} for "
                f"items of shape {shape}, got {tuple(kernel.shape)}"
            )
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "kernel", kernel)

    @property
    def out(self) -> tuple[int, ...]:
        """The shape of an item."""
        return self.shape

    def _padded(self) -> Tensor:
        """The kernel on the spatial grid, its centre at zero."""
        padded = torch.zeros(spatial(self.shape), dtype=torch.float64)
        padded[tuple(slice(k) for k in self.kernel.shape)] = self.kernel
        axes = tuple(range(padded.ndim))
        return padded.roll([-(k // 2) for k in self.kernel.shape], axes)

    def _symbol(self, _: torch.dtype) -> tuple[Tensor, Tensor]:
        """Real and imaginary parts of the kernel's transform, half of the frequencies."""
        symbol = torch.fft.rfftn(self._padded())
        return symbol.real, symbol.imag

    def _phases(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
        """``|h|``, where it is > 0, real and imaginary parts of ``p`` (half), whether onto."""
        symbol = torch.fft.fftn(self._padded())
        # Conjugates at k and -k in spite of rounding: Q is real and orthogonal by them.
        symbol = (symbol + mirrored(symbol, tuple(range(symbol.ndim))).conj()) / 2
        values = resolved(symbol.abs(), dtype)
        phase = symbol / symbol.abs().clamp_min(1e-300)  # without meaning where values are 0
        half = phase[..., : phase.shape[-1] // 2 + 1]
        channels = (1,) * (len(self.shape) - values.ndim)
        seen = values > 0
        return (
            values.reshape(*channels, *values.shape),
            seen.double().reshape(*channels, *values.shape),
            half.real,
            half.imag,
            bool(seen.all()),
        )

    def _filtered(self, x: Tensor, real: Tensor, imag: Tensor, conjugate: bool) -> Tensor:
        """``F^* diag(real +- i imag) F x``."""
        axes = batch_axes(self.shape)
        symbol = torch.complex(real, -imag if conjugate else imag)
        image = torch.fft.rfftn(full(self.measurements(x)), dim=axes) * symbol
        return torch.fft.irfftn(image, s=spatial(self.shape), dim=axes).to(x.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """The convolution, ``(B, *shape)``."""
        real, imag = self._kept("symbol", self._symbol, full(x))
        return self._filtered(self.items(x), real, imag, conjugate=False)

    def adjoint(self, y: Tensor) -> Tensor:
        """The correlation with the kernel, ``(B, *shape)``."""
        real, imag = self._kept("symbol", self._symbol, full(y))
        return self._filtered(y, real, imag, conjugate=True)

    def solve(self, r: Tensor, a: Any, b: Any) -> Tensor:
        """``F^* diag(1 / (a + b |h|^2)) F r``."""
        values = self._kept("phases", self._phases, full(r))[0]
        values = values[..., : values.shape[-1] // 2 + 1]
        over = inverse(factor(a, full(r)) + factor(b, full(r)) * values**2)
        return self._filtered(r, over, torch.zeros_like(over), conjugate=False)

    def spectrum(self, like: Tensor | None = None) -> Spectrum:
        """Absolute values of the kernel's transform; coefficients are Hartley's."""
        axes = batch_axes(self.shape)
        like = None if like is None else full(like)
        values, seen, real, imag, onto = self._kept("phases", self._phases, like)

        def transform(x: Tensor) -> Tensor:
            return hartley(self.items(x), axes)

        return Spectrum(
            values=values,
            to=transform,
            back=transform,
            measured=lambda y: seen * hartley(self._filtered(y, real, imag, conjugate=True), axes),
            measurement=lambda c: self._filtered(transform(seen * c), real, imag, conjugate=False),
            onto=onto,
        )


@dataclass(frozen=True, eq=False)
class MotionBlur(Convolution):
    """The mean along a line: a picture moved while it was taken, circular at its ends.

    Args:
        shape: of an item with two spatial axes.
        length: of the line in pixels, >= 1; an odd number of pixels must hold it.
        angle: of the line in degrees, from the last axis, counterclockwise.

    Raises:
        ValueError: for another number of axes, or a line that does not fit.
    """

    shape: tuple[int, ...]
    kernel: Tensor = field(init=False, repr=False)
    length: float = 9.0
    angle: float = 0.0

    def __post_init__(self) -> None:
        shape = item_shape(self.shape, "motion blur")
        if len(spatial_axes(shape)) != 2:
            raise ValueError(f"motion blur is for pictures (C, H, W), got the shape {shape}")
        longest = (min(spatial(shape)) - 1) // 2 * 2 + 1  # an odd kernel has a middle
        if not 1 <= self.length <= longest:
            raise ValueError(
                f"the length of motion blur is in [1, {longest}] for items of shape "
                f"{shape}, got {self.length}"
            )
        object.__setattr__(self, "kernel", self._line())
        super().__post_init__()

    def _line(self) -> Tensor:
        """Points on the line shared among the four pixels around each."""
        radius = math.ceil((self.length - 1) / 2)
        kernel = torch.zeros(2 * radius + 1, 2 * radius + 1, dtype=torch.float64)
        way = torch.linspace(-0.5, 0.5, 16 * radius + 1, dtype=torch.float64) * (self.length - 1)
        angle = math.radians(self.angle)
        place = radius + torch.stack([-math.sin(angle) * way, math.cos(angle) * way])
        place = place.clamp(0, 2 * radius)
        corner = place.floor().long().clamp(max=max(2 * radius - 1, 0))
        part = place - corner
        for dy in (0, 1):
            for dx in (0, 1):
                weight = (part[0] if dy else 1 - part[0]) * (part[1] if dx else 1 - part[1])
                row, column = (corner + torch.tensor([[dy], [dx]])).clamp(max=2 * radius)
                kernel.index_put_((row, column), weight, accumulate=True)
        return kernel / kernel.sum()
