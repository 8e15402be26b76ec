r"""Halving and doubling the resolution, plainly or through a finite impulse response filter.

A filter ``k_0..k_{n-1}``, normalised to sum 1, acts along each spatial axis, zeros outside:

    down:  y_i = sum_j k_j x_{2i - j + n//2}
    up:    y_i = 2 sum_j k_j z_{i - j + n//2 - 1},   z_{2i} = x_i, z_{2i+1} = 0

``k = (1, 1)`` is the mean of two neighbours and the nearest neighbour; ``k = (1, 3, 3, 1)``, which
doubles linearly, is that of NCSN++.

Sources: Making Convolutional Networks Shift-Invariant Again (Zhang, 2019),
https://arxiv.org/abs/1904.11486; Score-Based Generative Modeling through Stochastic Differential
Equations (Song et al., 2021), appendix H, https://arxiv.org/abs/2011.13456.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}
MEAN = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


def half_on_cpu(x: Tensor) -> bool:
    """Whether ``x`` is of half precision on a CPU, where some kernels are slow or absent."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


class Resampler(nn.Module):
    """Doubles and halves the spatial axes of ``(B, C, *spatial)`` with a filter.

    Args:
        n: number of spatial axes.
        taps: the filter along one axis, 2 to 64 taps; ``(1, 1)`` for none.

    Raises:
        ValueError: if there are fewer or more taps, or they sum to zero.
    """

    kernel: Tensor

    def __init__(self, n: int, taps: tuple[float, ...] = (1.0, 1.0)) -> None:
        super().__init__()
        if not 2 <= len(taps) <= 64 or not sum(taps):
            said = tuple(taps) if len(taps) <= 64 else f"{len(taps)} taps"
            raise ValueError(f"a filter has 2 to 64 taps and a sum, not {said}")
        self.n = n
        self.taps = tuple(taps)
        self.plain = len(set(taps)) == 1 and len(taps) == 2
        axis = torch.tensor(taps, dtype=torch.float64) / sum(taps)
        kernel = axis
        for _ in range(n - 1):
            kernel = kernel[..., None] * axis
        self.register_buffer("kernel", kernel.float()[None, None], persistent=False)

    def filtered(self, x: Tensor, padding: tuple[int, int], stride: int = 1) -> Tensor:
        """Each channel convolved with the filter, after zeros before and after each axis."""
        before, after = padding
        if before != after:
            x = functional.pad(x, (before, after) * self.n)
            before = 0
        kernel = self.kernel.flip([*range(2, self.n + 2)])  # torch correlates
        return self._each(CONV[self.n], x, kernel, stride, before)

    def down(self, x: Tensor) -> Tensor:
        """Half the resolution."""
        if self.plain and not (self.n == 3 and half_on_cpu(x)):
            return MEAN[self.n](x, 2)
        n = len(self.taps)
        return self.filtered(x, ((n - 1) // 2, (n - 2) // 2), stride=2)

    def up(self, x: Tensor) -> Tensor:
        """Twice the resolution."""
        if self.plain:
            return functional.interpolate(x, scale_factor=2.0)
        pad = (len(self.taps) - 2) // 2
        y = self._each(TRANSPOSED[self.n], x, 2.0**self.n * self.kernel, 2, pad)
        for axis in range(2, self.n + 2):
            y = y.narrow(axis, 0, 2 * x.shape[axis])
        return y

    def _each(
        self, conv: Callable[..., Tensor], x: Tensor, kernel: Tensor, stride: int, pad: int
    ) -> Tensor:
        """The kernel for each channel; a CPU has no fast one for half precision."""
        wide = x.float() if half_on_cpu(x) else x
        weight = kernel.to(wide.dtype).expand(x.shape[1], *kernel.shape[1:])
        y = conv(wide, weight, stride=stride, padding=pad, groups=x.shape[1])
        return y.to(x.dtype)
