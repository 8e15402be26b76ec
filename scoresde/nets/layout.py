"""How items lie: within the stride of a network that halves them, and in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def channels_last(x: Tensor) -> Tensor:
    """The tensor with its channels last in memory, as convolutions take pictures fastest."""
    if x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last_3d) if x.ndim == 5 else x


def weights_last(net: nn.Module, n: int) -> None:
    """Lays the weights of convolutions over ``n`` axes out as :func:`channels_last` does items."""
    if n > 1:
        last = torch.channels_last if n == 2 else torch.channels_last_3d
        net.to(memory_format=last)  # type: ignore[call-overload]


def image_for(x: Tensor, image: Tensor | None, channels: int) -> Tensor:
    """The condition ``image (B, channels, *spatial)`` of a network for ``x (B, C, *spatial)``.

    None is an image of zeros, which is how a network is told that nothing is known.

    Raises:
        ValueError: for an image that the network does not take, or of another shape.
    """
    wanted = (len(x), channels, *x.shape[2:])
    if image is None:
        return x.new_zeros(wanted)
    if not channels:
        raise ValueError("an image is given to a network without one; set image_channels")
    if tuple(image.shape) != wanted:
        raise ValueError(f"the image is of shape {tuple(image.shape)}; the network takes {wanted}")
    return image.to(x.dtype)


def margins(spatial: tuple[int, ...], stride: int) -> list[int]:
    """``(before, after)`` of each axis, last axis first, that lead to multiples of ``stride``."""
    missing = [-size % stride for size in spatial]
    return [p for m in reversed(missing) for p in (m // 2, m - m // 2)]


def padded(x: Tensor, stride: int) -> Tensor:
    """``(B, C, *spatial)`` amid zeros up to multiples of ``stride``, channels last in memory."""
    pads = margins(x.shape[2:], stride)
    return channels_last(functional.pad(x, pads) if any(pads) else x)


def cropped(x: Tensor, spatial: tuple[int, ...]) -> Tensor:
    """What :func:`padded` has put items of a ``spatial`` size into, without its zeros."""
    for axis, size in enumerate(spatial, start=2):
        x = x.narrow(axis, (x.shape[axis] - size) // 2, size)
    return x.contiguous()
