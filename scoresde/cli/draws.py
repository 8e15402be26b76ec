"""What a command drew of an item, side by side with what it was given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import options

if TYPE_CHECKING:
    from torch import Tensor

    from ..model import ScoreModel
    from ..sheet import Column

SHOWN = 8
"""Draws of an item that a picture shows; mean and uncertainty are of all."""


class Shown(NamedTuple):
    """Items beside the draws: their title, the model of their units, and they in its range."""

    title: str
    model: ScoreModel
    x: Tensor
    known: Tensor | None = None
    """True where they are known, of the shape of an item; None for everywhere."""


def write_draws(
    file: Path,
    model: ScoreModel,
    draws: Tensor,
    before: Sequence[Shown | Column],
    after: Sequence[Shown | Column] = (),
) -> None:
    """A picture of what was given and what was drawn, or the draws in data units as an array.

    Args:
        file: .png, or .npy for the draws, ``(N, draws, *shape)``, of one item ``(draws, *shape)``.
        model: of the draws.
        draws: in model range, ``(N, draws, *shape)``.
        before: what a picture shows first: items, or columns of pictures as they are.
        after: what it shows behind the draws.
    """
    import numpy as np

    from ..pictures import save_draws
    from ..sheet import sheet

    columns = None if file.suffix == ".npy" else _columns(model, draws, before, after)
    with options.whole(file) as draft:
        if file.suffix == ".npy":
            items = in_data(model, draws.flatten(0, 1)).unflatten(0, draws.shape[:2])
            np.save(draft, (items[0] if len(items) == 1 else items).cpu().numpy())
        elif columns is not None:
            sheet(columns).save(draft)
        else:
            shown = in_data(model, draws.flatten(0, 1)).unflatten(0, draws.shape[:2])
            beside = [s for s in (*before, *after) if isinstance(s, Shown)]
            beside.sort(key=lambda s: s.known is None)  # what is partly known comes first
            known = next((s.known for s in beside if s.known is not None), None)
            save_draws(draft, shown, [(s.title, in_data(s.model, s.x)) for s in beside], known)


def in_data(model: ScoreModel, x: Tensor) -> Tensor:
    """Items ``(B, *shape)`` in data units."""
    return x if model.scaler is None else model.scaler.decode(x)


def spread(model: ScoreModel, draws: Tensor) -> Tensor:
    """Draws less their mean, in data units, ``(N, draws, *shape)``."""
    apart = draws - draws.mean(1, keepdim=True)
    if model.scaler is None:
        return apart
    return model.scaler.difference(apart.flatten(0, 1)).unflatten(0, draws.shape[:2])


def _images(model: ScoreModel, x: Tensor) -> Tensor | None:
    """Items in model range as pictures, uint8; None where they are none."""
    import torch

    from ..pictures import as_images

    if x.ndim not in (4, 5):
        return None
    if model.scaler is None:
        return as_images(((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    return as_images(model.scaler.image(x))


def _columns(
    model: ScoreModel,
    draws: Tensor,
    before: Sequence[Shown | Column],
    after: Sequence[Shown | Column],
) -> list[Any] | None:
    """The columns of a sheet; None for items that are no pictures."""
    from ..pictures import as_images
    from ..sheet import Column, uncertainty

    if _images(model, draws[:, 0]) is None:
        return None
    count = draws.shape[1]
    columns: list[Any] = [_column(s) for s in before]
    columns.append(None)
    for k in range(min(count, SHOWN)):
        title = "result" if count == 1 else f"result {k + 1}"
        columns.append(Column(title, _images(model, draws[:, k])))  # type: ignore[arg-type]
    columns.append(None)
    if count > 1:
        apart = as_images(spread(model, draws).flatten(0, 1))
        heat = uncertainty(apart.unflatten(0, draws.shape[:2]))  # type: ignore[union-attr]
        mean = Column("mean", _images(model, draws.mean(1)))  # type: ignore[arg-type]
        columns += [mean, Column("std", heat.images, heat.most)]
    columns += [_column(s) for s in after]
    return columns


def _column(shown: Shown | Column) -> Any:
    """A column of items, open where they are not known; one of pictures as it is."""
    from ..pictures import as_images
    from ..sheet import Column, veiled

    if not isinstance(shown, Shown):
        return shown
    images: Any = _images(shown.model, shown.x)
    if shown.known is not None:
        known: Any = as_images(shown.known.expand(shown.x.shape))
        images = veiled(images, known)
    return Column(shown.title, images)
