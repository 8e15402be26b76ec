r"""An affine map of the plane applied to images, one map an image, band-limited on both sides.

    out(q) = image(M^-1 (q - c - shift) + c),    c the centre, q and shift in pixels

The image is doubled in resolution by Lanczos interpolation, which leaves its own pixels as they
are; sampled bilinearly at twice the resolution of the output; and low-pass filtered to its pixels
by the Lanczos kernel

    L(d) = sinc(d) sinc(d/3),    |d| < 3

so that shrinking by up to two does not alias. Beyond its frame the image is mirrored at the
centres of its outermost pixels. Both filters are matrices from the left and the right.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

REACH = 3
"""Pixels to each side that the Lanczos kernel sees."""

SMALLEST = 2
"""Pixels an axis must have."""


def warp(images: Tensor, linear: Tensor, shift: Tensor) -> Tensor:
    """The images, each by its own map: what is at ``c + p`` goes to ``c + M p + shift``.

    Args:
        images: ``(B, C, H, W)``, with two pixels or more each way.
        linear: ``M``, ``(B, 2, 2)``, of vectors (right, down).
        shift: ``(B, 2)``, pixels (right, down).

    Returns:
        ``(B, C, H, W)``.
    """
    height, width = images.shape[-2:]
    like = (images.device, images.dtype)
    doubled = doubling(height, *like) @ images @ doubling(width, *like).T
    cx, cy = (width - 1) / 2, (height - 1) / 2
    qx = fine(width, *like) - cx - shift[:, 0].reshape(-1, 1, 1)
    qy = (fine(height, *like) - cy)[:, None] - shift[:, 1].reshape(-1, 1, 1)
    a, b, c, d = inverse(linear).reshape(-1, 4, 1, 1).unbind(1)
    p = torch.stack([(a * qx + b * qy) / cx, (c * qx + d * qy) / cy], -1)  # the frame is [-1, 1]
    sampled = functional.grid_sample(
        doubled, p, mode="bilinear", padding_mode="reflection", align_corners=True
    )
    return halving(height, *like) @ sampled @ halving(width, *like).T


def inverse(linear: Tensor) -> Tensor:
    """The inverse of matrices ``(B, 2, 2)``."""
    a, b, c, d = linear.flatten(1).unbind(1)
    adjugate = torch.stack([d, -b, -c, a], 1).reshape(-1, 2, 2)
    return adjugate / (a * d - b * c).reshape(-1, 1, 1)


def fine(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Places of the fine samples of ``n`` output pixels: half a pixel apart, within reach."""
    margin = REACH - 0.5
    return torch.arange(2 * n + 4 * REACH - 3, device=device, dtype=dtype) / 2 - margin


def lanczos(distance: Tensor) -> Tensor:
    """``sinc(d) sinc(d/3)`` within reach, the rows made to sum to one."""
    weight = torch.sinc(distance) * torch.sinc(distance / REACH) * (distance.abs() < REACH)
    return weight / weight.sum(-1, keepdim=True)


@lru_cache(maxsize=64)
def doubling(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``(2 n - 1, n)``: ``n`` pixels to themselves and the points half-way between them."""
    places = torch.arange(2 * n - 1, dtype=torch.float64) / 2
    pixels = torch.arange(-REACH, n + REACH)
    weight = lanczos(places[:, None] - pixels)
    weight[::2] = weight[::2].round()  # 0 and 1, which sinc meets up to rounding
    period = 2 * (n - 1)
    mirrored = pixels % period
    mirrored = torch.minimum(mirrored, period - mirrored)
    matrix = torch.zeros(2 * n - 1, n, dtype=torch.float64).index_add_(1, mirrored, weight)
    return matrix.to(dtype).to(device)


@lru_cache(maxsize=64)
def halving(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``(n, m)``: the low-pass filter from the ``m`` fine samples to ``n`` pixels."""
    places = fine(n, torch.device("cpu"), torch.float64)
    return lanczos(torch.arange(n, dtype=torch.float64)[:, None] - places).to(dtype).to(device)
