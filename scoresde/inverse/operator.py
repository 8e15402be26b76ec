r"""A linear map ``A`` of items to measurements, and its singular value decomposition.

A measurement is ``y = A x + noise_std e``, ``e ~ N(0, I)``. Methods ask an operator for ``A x``,
``A^T y``, the pseudo-inverse ``A^+ y`` and ``(a I + b A A^T)^{-1} r``. With a spectrum
``A = U S V^T`` the last two are one division a coefficient; without one, conjugate gradients find
them from ``A`` and ``A^T`` alone. Everything is in model range, for items of any shape.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..noise import KeyedNoise
from . import krylov


@dataclass(frozen=True)
class Spectrum:
    """``A = U S V^T`` with ``V`` orthogonal on all of item space.

    Args:
        values: singular values >= 0, that broadcast with the coefficients; zero where ``A`` sees
            nothing (and where a value is below what the dtype resolves).
        to: ``x -> V^T x``, coefficients ``(B, ...)``, as many as an item has numbers.
        back: ``c -> V c``, its inverse.
        measured: ``y -> U^T y`` laid out as the coefficients, zero where ``values`` is.
        measurement: ``c -> U c``, its transpose, ``(B, *out)``.
        onto: whether ``U U^T = I``: every measurement is that of an item.
    """

    values: Tensor
    to: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    measured: Callable[[Tensor], Tensor]
    measurement: Callable[[Tensor], Tensor]
    onto: bool = False


def resolved(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values``, with zeros below ``max(shape) eps max(values)``: what a dtype resolves."""
    size = max([32, *values.shape])
    return values * (values > size * torch.finfo(dtype).eps * values.max())


def factor(a: Any, like: Tensor) -> Tensor:
    """A number, or one a sample, ``(B, ...)``, so that it broadcasts with ``like``."""
    number = isinstance(a, (int, float))  # stays on the CPU: nothing waits for a device
    a = torch.as_tensor(a, dtype=like.dtype, device="cpu" if number else like.device)
    return a if a.ndim == 0 else a.reshape(-1, *(1,) * (like.ndim - 1))


def inverse(x: Tensor) -> Tensor:
    """``1 / x``, and 0 where ``x`` is, with gradients that stay finite there."""
    return torch.where(x > 0, 1 / torch.where(x > 0, x, 1), 0)


def check_noise(noise_std: Any, who: str) -> None:
    """Refuses a standard deviation of a measurement's noise that is not one number >= 0."""
    one = isinstance(noise_std, (int, float)) or getattr(noise_std, "ndim", 1) == 0
    if not one or not 0 <= noise_std < math.inf:
        raise ValueError(f"{who} needs a finite noise_std >= 0, one number, got {noise_std!r}")


class Operator(ABC):
    """A linear map of items ``(B, *shape)`` to measurements ``(B, *out)``.

    A subclass gives ``shape``, ``out``, ``__call__`` and ``adjoint``; a spectrum makes the rest
    exact and fast.
    """

    shape: tuple[int, ...]
    """Shape of an item."""
    iterations: int = 500
    """Largest number of iterations of conjugate gradients, where there is no spectrum."""

    @property
    @abstractmethod
    def out(self) -> tuple[int, ...]:
        """Shape of a measurement."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """``A x``: ``(B, *shape)`` to ``(B, *out)``."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """``A^T y``: ``(B, *out)`` to ``(B, *shape)``."""

    def spectrum(self, like: Tensor | None = None) -> Spectrum | None:
        """The singular value decomposition, or None where it is unknown.

        Args:
            like: its device and dtype are those of the values; float64 on the CPU without it.
        """
        return None

    @property
    def count(self) -> int:
        """How many numbers are really measured."""
        return math.prod(self.out)

    def seen(self, y: Tensor) -> Tensor:
        """``y`` with zeros for the entries, if any, that are no part of a measurement."""
        return y

    @cached_property
    def norm(self) -> float:
        """The largest singular value."""
        spectrum = self.spectrum()
        if spectrum is not None:
            return float(spectrum.values.max())
        with torch.no_grad():
            square = krylov.largest(lambda x: self.adjoint(self(x)), self._random(1, self.shape))
        return math.sqrt(square)

    def pinv(self, y: Tensor) -> Tensor:
        """``A^+ y``: of all items that fit ``y`` best, the smallest, ``(B, *shape)``."""
        spectrum = self.spectrum(y)
        if spectrum is None:
            return krylov.PseudoInverse.apply(self, self.measurements(y), False)
        return spectrum.back(inverse(spectrum.values) * spectrum.measured(y))

    def solve(self, r: Tensor, a: Any, b: Any) -> Tensor:
        """``(a I + b A A^T)^{-1} r``; where ``a`` is 0, the pseudo-inverse.

        Args:
            r: ``(B, *out)``.
            a: >= 0, a number or one a sample, ``(B, 1, ..., 1)``.
            b: likewise.
        """
        spectrum = self.spectrum(r)
        if spectrum is None:
            return krylov.solve(self, self.measurements(r), factor(a, r), factor(b, r))
        c = spectrum.measured(r)
        inside = inverse(factor(a, c) + factor(b, c) * spectrum.values**2)
        z = spectrum.measurement(inside * c)
        if spectrum.onto:  # what were left outside would be rounding, divided by a
            return z
        return z + inverse(factor(a, r)) * (r - spectrum.measurement(c))

    def measure(
        self, x: Tensor, noise_std: Any = 0.0, noise: Tensor | None = None, seed: int = 0
    ) -> Tensor:
        """``A x + noise_std e`` on what is measured.

        Args:
            x: ``(B, *shape)``.
            noise_std: a number or one a sample, ``(B, 1, ..., 1)``.
            noise: ``e``, ``(B, *out)``; drawn from ``seed``, keyed by sample, without it.
            seed: of the noise.
        """
        y = self(x)
        if noise is None:
            noise = KeyedNoise(seed).normal(tuple(y.shape), y.device, y.dtype)
        return y + factor(noise_std, y) * self.seen(self.measurements(noise))

    def log_likelihood(self, y: Tensor, mean: Tensor, std: Any) -> Tensor:
        """``log N(y; mean, std^2 I)`` over the ``count`` measured numbers, ``(B,)``.

        Args:
            y: ``(B, *out)`` or ``(1, *out)``.
            mean: ``A x``, ``(B, *out)``.
            std: > 0, a number or one a sample, ``(B, 1, ..., 1)``.
        """
        std = factor(std, mean)
        square = (self.seen(self.measurements(y) - mean) / std).square().flatten(1).sum(1)
        return -0.5 * square - self.count * (0.5 * math.log(2 * math.pi) + std.log().flatten())

    def adjointness(self, batch: int = 4, seed: int = 0) -> float:
        """Largest ``|<A x, y> - <x, A^T y>| / (|A x| |y|)`` of random items: rounding alone."""
        x, y = self._random(batch, self.shape, seed), self._random(batch, self.out, seed + 1)
        with torch.no_grad():
            image = self(x)
            error = (
                krylov.dot(image, y).flatten() - krylov.dot(x, self.adjoint(y)).flatten()
            ).abs()
            scale = (krylov.dot(image, image) * krylov.dot(y, y)).sqrt().flatten()
            return float((error / scale.clamp_min(torch.finfo(x.dtype).tiny)).max())

    def dense(self) -> Tensor:
        """The matrix of the map, ``(prod(out), prod(shape))``: for small items."""
        device, dtype = self.home
        eye = torch.eye(math.prod(self.shape), dtype=dtype, device=device)
        with torch.no_grad():
            return self(eye.reshape(-1, *self.shape)).flatten(1).T

    def items(self, x: Tensor) -> Tensor:
        """``x`` if it is a batch of items.

        Raises:
            ValueError: if it is not.
        """
        return self._checked(x, self.shape, "items")

    def measurements(self, y: Tensor) -> Tensor:
        """``y`` if it is a batch of measurements.

        Raises:
            ValueError: if it is not.
        """
        return self._checked(y, self.out, "measurements")

    def _checked(self, x: Tensor, shape: tuple[int, ...], kind: str) -> Tensor:
        if not isinstance(x, Tensor) or not x.ndim or tuple(x.shape[1:]) != tuple(shape):
            wanted = ", ".join(("B", *map(str, shape)))
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"{kind} of {type(self).__name__} have the shape ({wanted}), got {found}"
            )
        if not (x.is_floating_point() or x.is_complex()):
            raise ValueError(
                f"{kind} of {type(self).__name__} are floating-point numbers in model range, "
                f"got {x.dtype}"
            )
        return x

    def _random(self, batch: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
        return KeyedNoise(seed).normal((batch, *shape), *self.home)

    @property
    def home(self) -> tuple[torch.device, torch.dtype]:
        """Where and in which dtype the operator is tried; its calls follow their argument."""
        return torch.device("cpu"), torch.float64

    def _kept(
        self, name: str, make: Callable[[torch.dtype], Any], like: Tensor | None = None
    ) -> Any:
        """What ``make`` gives for a dtype, on the device of ``like``; made once for each.

        ``make`` returns a tensor, or a tuple of tensors and plain values, of the CPU in float64.
        """
        device = torch.device("cpu") if like is None else like.device
        dtype = torch.float64 if like is None else like.dtype
        kept = self.__dict__.setdefault("_made", {})
        key = (name, device, dtype)
        if key not in kept:
            with torch.inference_mode(False), torch.no_grad():
                made = make(dtype)
                parts = made if isinstance(made, tuple) else (made,)
                moved = tuple(
                    p.to(dtype).to(device) if isinstance(p, Tensor) else p for p in parts
                )
                kept[key] = moved if isinstance(made, tuple) else moved[0]
        return kept[key]
