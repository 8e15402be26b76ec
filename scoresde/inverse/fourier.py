r"""Under-sampled Fourier transforms, in real numbers.

The unitary DFT of a real item is complex and says everything twice, ``F(-k) = conj F(k)``. The
discrete Hartley transform ``H x = Re F x - Im F x`` (the sum with ``cas = cos + sin``) holds the
same numbers once: it is real, orthonormal, symmetric and its own inverse, ``H H = I``. Measuring
``H x`` at ``k`` and ``-k`` is measuring ``F x`` there, so that for masks that are symmetric under
``k -> -k`` the two under-samplings are the same, and so is white noise.

Source: Discrete Hartley transform (Bracewell, 1983), https://doi.org/10.1364/JOSA.73.001832.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..noise import KeyedNoise
from .mask import Selection
from .operator import Spectrum
from .shapes import item_shape, spatial_axes


def batch_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The spatial axes of a batch of items."""
    return tuple(i + 1 for i in spatial_axes(shape))


def full(x: Tensor) -> Tensor:
    """``x`` in a dtype that transforms have."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def hartley(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """``H x = Re F x - Im F x`` over ``axes``, with the unitary DFT ``F``; its own inverse."""
    c = torch.fft.fftn(full(x), dim=axes, norm="ortho")
    return (c.real - c.imag).to(x.dtype)


def mirrored(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """``x(-k)`` for ``x(k)``: frequencies of the opposite sign, over ``axes``."""
    return x.flip(axes).roll((1,) * len(axes), axes)


def from_complex(kspace: Tensor, axes: tuple[int, ...], measured: Tensor | None = None) -> Tensor:
    """Hartley coefficients of a real item from its unitary DFT.

    ``k`` and the conjugate of ``-k`` are averaged, or one of them is taken where only one is
    measured. Noise of standard deviation ``s`` in each real and imaginary part, independent at
    ``k`` and ``-k``, becomes white noise of ``s``; where only one of them is measured,
    ``sqrt(2) s``.

    Args:
        kspace: complex, ``(B, *shape)``, zero frequency first (as by ``torch.fft.fftn`` with
            ``norm="ortho"``); what it holds where nothing is measured has no say.
        axes: of the transform.
        measured: 1 where data are measured, broadcasts with ``kspace``; everywhere without it.
    """
    if measured is None:
        measured = torch.ones((1,) * kspace.ndim)
    weight = measured.to(kspace.device).broadcast_to(kspace.shape) > 0
    one = torch.where(weight, kspace, 0)
    both = one + mirrored(one, axes).conj()
    count = weight.to(both.real.dtype) + mirrored(weight, axes).to(both.real.dtype)
    return (both.real - both.imag) / count.clamp_min(1)


def to_complex(coefficients: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The unitary DFT of a real item from its Hartley coefficients, the inverse of the above."""
    other = mirrored(coefficients, axes)
    return torch.complex((coefficients + other) / 2, (other - coefficients) / 2)


@dataclass(frozen=True, eq=False)
class Fourier(Selection):
    """``A x = mask * H x``: some coefficients of the Hartley transform over the spatial axes.

    For a mask that is symmetric under ``k -> -k`` (``symmetric``) this is under-sampling of the
    Fourier transform; :meth:`coefficients` turns complex data into measurements.

    Args:
        mask: 1 where a frequency is measured; zero frequency first; of the shape of an item.
        shape: of an item, with which the mask broadcasts; that of the mask without it.

    Raises:
        ValueError: as :class:`~scoresde.inverse.mask.Mask`.
    """

    @property
    def symmetric(self) -> bool:
        """Whether ``-k`` is measured wherever ``k`` is."""
        return bool((mirrored(self.mask, spatial_axes(self.shape)) == self.mask).all())

    def __call__(self, x: Tensor) -> Tensor:
        """The measured coefficients, zeros elsewhere."""
        return self.seen(hartley(self.items(x), batch_axes(self.shape)))

    def adjoint(self, y: Tensor) -> Tensor:
        """The item of the measured coefficients alone, which is the pseudo-inverse too."""
        return hartley(self.seen(self.measurements(y)), batch_axes(self.shape))

    def spectrum(self, like: Tensor | None = None) -> Spectrum:
        """Values of 0 and 1; coefficients are those of the transform."""
        axes = batch_axes(self.shape)

        def seen(c: Tensor) -> Tensor:
            return self.seen(self.measurements(c))

        def transform(x: Tensor) -> Tensor:
            return hartley(self.items(x), axes)

        return Spectrum(self.known(like), transform, transform, seen, seen)

    def coefficients(self, kspace: Tensor, measured: Tensor | None = None) -> Tensor:
        """A measurement from complex data, as :func:`from_complex`: ``(B, *shape)``."""
        return self.seen(from_complex(self.items(kspace), batch_axes(self.shape), measured))


@dataclass(frozen=True, eq=False)
class FourierLines(Fourier):
    """Whole lines of frequencies: all the low ones, the others at random, in pairs ``k, -k``.

    Args:
        shape: of an item.
        acceleration: of ``n`` lines about ``n / acceleration`` are measured, >= 1.
        low: share of the lines that are low frequencies, all measured.
        axis: of an item, across which lines are chosen.
        seed: of the random ones.

    Raises:
        ValueError: for numbers out of range, or a channel axis.
    """

    mask: Tensor = field(init=False, repr=False)
    shape: tuple[int, ...]
    acceleration: float = 4.0
    low: float = 0.08
    axis: int = -1
    seed: int = 0

    def __post_init__(self) -> None:
        shape = item_shape(self.shape, "lines of frequencies")
        axis = self.axis % len(shape) if -len(shape) <= self.axis < len(shape) else -1
        if axis not in spatial_axes(shape):
            raise ValueError(
                f"the axis of lines is a spatial one of an item of shape {shape}, got {self.axis}"
            )
        if not self.acceleration >= 1 or not 0 <= self.low <= 1:
            raise ValueError(
                f"acceleration is >= 1 and low is in [0, 1], got {self.acceleration}, {self.low}"
            )
        lines = self._lines(shape[axis])
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "mask", lines.reshape(-1, *(1,) * (len(shape) - axis - 1)))
        super().__post_init__()

    def _lines(self, n: int) -> Tensor:
        """``(n,)`` booleans: pairs by rank, low frequencies first, until there are enough."""
        frequency = torch.minimum(torch.arange(n), n - torch.arange(n))
        always = max(1, round((self.low * n - 1) / 2) + 1)  # zero and pairs
        rank = KeyedNoise(self.seed).uniform((1, n // 2 + 1), dtype=torch.float64)[0]
        rank[:always] = -1.0
        rank = rank.argsort(stable=True)
        size = torch.where((rank == 0) | (2 * rank == n), 1, 2).cumsum(0)
        wanted = max(int((size <= n / self.acceleration + 1e-9).sum()), always)
        return torch.isin(frequency, rank[:wanted])
