r"""Spherical interpolation: between points of noise, along the sphere on which noise lies.

With ``u`` the direction of ``a``, ``e`` the unit vector across it towards ``b``, and ``omega`` the
angle between the two:

    slerp(a, b, w) = ((1 - w)|a| + w|b|) (cos(w omega) u + sin(w omega) e)

Source: Animating rotation with quaternion curves (Shoemake, 1985),
https://doi.org/10.1145/325165.325242.
"""

from __future__ import annotations

import torch
from torch import Tensor


def slerp(a: Tensor, b: Tensor, w: float | Tensor) -> Tensor:
    """The point at the share ``w`` of the way from ``a`` to ``b`` along the sphere.

    Directions go by the angle between them, lengths linearly. Opposite directions have no
    shortest way: they go by a fixed direction across. Where one vector is zero the way is a line.

    Args:
        a: ``(B, *shape)``, a vector an item.
        b: the same.
        w: share in [0, 1], a number, ``()`` or ``(B,)``; others go on along the circle.

    Returns:
        ``(B, *shape)``; ``a`` for ``w = 0`` and ``b`` for ``w = 1``.

    Raises:
        ValueError: shapes that differ, or a ``w`` that does not fit.
    """
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(
            f"slerp needs two tensors of one shape (B, *shape), got {tuple(a.shape)} "
            f"and {tuple(b.shape)}"
        )
    share = torch.as_tensor(w, dtype=a.dtype, device=a.device)
    if share.ndim > 1 or share.numel() not in (1, len(a)):
        raise ValueError(f"slerp needs w of shape () or ({len(a)},), got {tuple(share.shape)}")
    share = share.expand(len(a))[:, None]
    x, y = a.flatten(1), b.flatten(1)
    size_x, size_y = x.norm(dim=1, keepdim=True), y.norm(dim=1, keepdim=True)
    tiny = torch.finfo(a.dtype).tiny
    u, v = x / size_x.clamp_min(tiny), y / size_y.clamp_min(tiny)
    cos = (u * v).sum(1, keepdim=True)
    across = v - cos * u
    sin = across.norm(dim=1, keepdim=True)
    omega = torch.atan2(sin, cos)  # exact for small angles and for those near pi
    lost = sin < 8 * torch.finfo(a.dtype).eps  # what is left of it is rounding
    e = _across(torch.where(lost, _least(u), across / sin.clamp_min(tiny)), u)
    size = torch.lerp(size_x, size_y, share)
    out = size * (torch.cos(share * omega) * u + torch.sin(share * omega) * e)
    out = torch.where((size_x == 0) | (size_y == 0), torch.lerp(x, y, share), out)
    out = torch.where(share == 0, x, torch.where(share == 1, y, out))
    return out.reshape(a.shape)


def _least(u: Tensor) -> Tensor:
    """The unit vector of the axis that each row of ``u (B, D)`` has least of."""
    return torch.zeros_like(u).scatter_(1, u.abs().argmin(1, keepdim=True), 1.0)


def _across(e: Tensor, u: Tensor) -> Tensor:
    """The part of ``e`` across the unit vector ``u``, at unit length; in one dimension zero."""
    e = e - (e * u).sum(1, keepdim=True) * u
    return e / e.norm(dim=1, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny)


__all__ = ["slerp"]
