"""Random masks over any number of spatial axes, 1 where an entry is known, to train with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .noise import NoiseSource, uniform

KINDS = ("boxes", "outside", "strokes", "pixels")
BOXES = 3
"""Boxes that may hide parts of one item."""
CORNERS = 5
"""Corners of a stroke."""


def random_masks(
    batch: int,
    spatial: tuple[int, ...],
    kinds: tuple[str, ...] = KINDS,
    source: NoiseSource | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Masks ``(B, 1, *spatial)`` of 0 (hidden) and 1 (known), float32.

    Args:
        batch: number B of masks.
        spatial: their size.
        kinds: each mask is of one of these, by equal chances.
        source: where the random numbers come from; a mask depends on its own alone.
        device: where the masks are.
    """
    axes = len(spatial)
    ruled = 1 + BOXES * (1 + 2 * axes) + CORNERS * axes + 2
    u = uniform((batch, ruled), source, device=device, dtype=torch.float32)
    single = uniform((batch, math.prod(spatial)), source, device=device, dtype=torch.float32)
    grid = _grid(spatial, u.device)
    box = 1 + BOXES * (1 + 2 * axes)
    boxes = u[:, 1:box].reshape(batch, BOXES, -1)
    corners = u[:, box : box + CORNERS * axes].reshape(batch, CORNERS, axes)
    rate, width = u[:, -2:].unbind(1)
    found = []
    for kind in kinds:
        if kind == "boxes":
            found.append(~_in_boxes(grid, boxes).any(1))
        elif kind == "outside":
            found.append(_in_boxes(grid, boxes[:, :1])[:, 0])
        elif kind == "strokes":
            found.append(to_lines(grid, corners) > 0.03 + 0.12 * width[:, None])
        else:
            found.append(single < rate[:, None])
    chosen = (u[:, 0] * len(kinds)).long().clamp_max(len(kinds) - 1)
    mask = torch.stack(found, 1)[torch.arange(batch, device=u.device), chosen]
    return mask.float().reshape(batch, 1, *spatial)


def _grid(spatial: tuple[int, ...], device: torch.device) -> Tensor:
    """Centres of the entries in the unit cube, ``(P, axes)``."""
    lines = [(torch.arange(n, device=device) + 0.5) / n for n in spatial]
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).reshape(-1, len(spatial))


def _in_boxes(grid: Tensor, u: Tensor) -> Tensor:
    """Whether each entry is in each box, ``(B, boxes, P)``; every box after the first is there
    by half a chance."""
    axes = grid.shape[1]
    there, centre, size = u.split([1, axes, axes], 2)
    half = (0.15 + 0.75 * size) / 2
    inside = ((grid - centre[:, :, None]).abs() < half[:, :, None]).all(3)
    first = torch.arange(u.shape[1], device=u.device) == 0
    return inside & (first[:, None] | (there < 0.5))


def to_lines(grid: Tensor, corners: Tensor) -> Tensor:
    """Distance of each place ``(P, axes)`` to each line ``(B, corners, axes)``, ``(B, P)``."""
    start, way = corners[:, :-1, None], (corners[:, 1:] - corners[:, :-1])[:, :, None]
    to = grid - start
    along = ((to * way).sum(3) / way.square().sum(3).clamp_min(1e-12)).clamp(0, 1)
    return (to - along[..., None] * way).norm(dim=3).amin(1)
