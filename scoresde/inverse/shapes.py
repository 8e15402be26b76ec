"""Shapes of items: their channels and their spatial axes."""

from __future__ import annotations

from typing import Any


def item_shape(shape: Any, what: str) -> tuple[int, ...]:
    """``shape`` as a tuple of positive integers.

    Raises:
        ValueError: if it is something else.
    """
    try:
        found = tuple(int(n) for n in shape)
    except (TypeError, ValueError):
        found = ()
    if not found or min(found) < 1:
        raise ValueError(f"{what} needs the shape of an item, such as (3, 64, 64), got {shape!r}")
    return found


def spatial_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of an item after its channels, ``(1, ..., n - 1)``; the only axis of a vector."""
    return tuple(range(1, len(shape))) or (0,)


def spatial(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the spatial axes."""
    return tuple(shape[i] for i in spatial_axes(shape))
