"""Sheets: items in rows, what was known of them and what was drawn in titled columns.

A sheet puts side by side what a method was given, its draws, their mean, and how uncertain it is.
Tiles grow by whole factors without smoothing; a smaller picture (a measurement of low resolution)
fills its tile; what is not known is a checkerboard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

INK, SOFT, LINE = "#1f2a44", "#6b7690", "#ccd2dc"
MARGIN, GAP, WIDE = 14, 6, 20
TILE = 96
"""Pixels that a tile has at least."""
CHECKER = ("#ffffff", "#dfe3ea")
HEAT = ("#ffffff", "#f4c9b5", "#d1495b", "#6d2a58", "#1f2a44")
"""Colours of the uncertainty, from none to the most."""


class Column(NamedTuple):
    """A column of a sheet.

    Args:
        title: what stands above it.
        images: uint8, ``(N, C, H, W)``: grey (C = 1), RGB (3), or either with a last channel of
            opacity (2 and 4), 0 where nothing is known.
        most: for a column of :func:`uncertainty` the value of the strongest colour, which a small
            scale under the column then tells.
    """

    title: str
    images: Tensor
    most: float | None = None


class Heat(NamedTuple):
    """Uncertainty as colours, uint8 ``(N, 3, H, W)``, and the value of the strongest colour."""

    images: Tensor
    most: float


def sheet(columns: Sequence[Column | tuple[str, Tensor] | None], scale: int | None = None) -> Any:
    """A PIL image with a row for each item and a titled column for each kind of picture.

    Args:
        columns: columns, or pairs of a title and images as in :class:`Column`; None widens the
            gap between two groups. The largest pictures set the size of a tile, the others are
            stretched to it without smoothing.
        scale: pixels of the sheet for each of the largest pictures' pixels, so that a tile has
            96 or more if None.

    Raises:
        ValueError: no column, rows that differ in number, or images of another kind.
    """
    from PIL import Image, ImageDraw

    shown = [None if c is None else Column(*c) for c in columns]
    filled = [c for c in shown if c is not None]
    _check(filled)
    height = max(c.images.shape[2] for c in filled)
    width = max(c.images.shape[3] for c in filled)
    scale = scale or max(1, -(-TILE // max(height, width)))
    height, width, rows = height * scale, width * scale, len(filled[0].images)
    text = _font(max(11, min(15, width // 8)))
    head = MARGIN + sum(text.getmetrics()) + GAP
    foot = head if any(c.most is not None for c in filled) else MARGIN

    lefts, x = [], MARGIN
    for i, column in enumerate(shown):
        if column is None:
            x += WIDE - GAP
            continue
        room = max(width, math.ceil(text.getlength(column.title)))
        lefts.append(x + (room - width) // 2)
        x += room + (GAP if i < len(shown) - 1 else 0)
    bottom = head + rows * (height + GAP) - GAP
    page = Image.new("RGB", (x + MARGIN, bottom + foot), "#ffffff")
    draw = ImageDraw.Draw(page)
    for column, left in zip(filled, lefts, strict=True):
        centre = left + width / 2
        draw.text((centre, head - GAP), column.title, INK, text, anchor="md")
        for row, image in enumerate(column.images.cpu()):
            top = head + row * (height + GAP)
            page.paste(_tile(image, width, height), (left, top))
            draw.rectangle((left - 1, top - 1, left + width, top + height), outline=LINE)
        if column.most is not None:
            _legend(page, draw, text, left, bottom + GAP, width, column.most)
    return page


def veiled(images: Tensor, known: Tensor) -> Tensor:
    """Images with their opacity as a last channel: what is not known is not shown.

    Args:
        images: uint8, ``(N, C, H, W)``, C of 1 or 3.
        known: bool, what is known, that broadcasts with ``images``; a pixel is where any of its
            channels is.
    """
    seen = known.to(images.device).expand_as(images).any(1, keepdim=True)
    return torch.cat([images, seen.to(torch.uint8) * 255], 1)


def uncertainty(x: Tensor, most: float | None = None) -> Heat:
    """Standard deviations over draws, as colours of one scale for all items.

    Args:
        x: draws, ``(N, draws, C, H, W)``, in the unit that the scale is to be read in. Channels
            are put together by their root mean square.
        most: value of the strongest colour, the largest there is if None.

    Raises:
        ValueError: for another number of axes.
    """
    if x.ndim != 5:
        raise ValueError(f"uncertainty needs draws (N, draws, C, H, W), got {tuple(x.shape)}")
    spread = x.double().var(1, correction=min(1, x.shape[1] - 1)).mean(1).sqrt().cpu()
    most = float(spread.max()) if most is None else float(most)
    return Heat(_colours(spread / most if most > 0 else spread).movedim(-1, 1), most)


def _colours(share: Tensor) -> Tensor:
    """Colours ``(..., 3)``, uint8, of shares of the most, in [0, 1]."""
    from PIL import ImageColor

    stops = torch.tensor([ImageColor.getrgb(c) for c in HEAT], dtype=torch.float64)
    place = share.clamp(0, 1) * (len(stops) - 1)
    low = place.floor().clamp_max(len(stops) - 2).long()
    mixed = torch.lerp(stops[low], stops[low + 1], (place - low)[..., None])
    return mixed.round().to(torch.uint8)


def _tile(image: Tensor, width: int, height: int) -> Any:
    """One picture ``(C, H, W)`` at the size of a tile, over a checkerboard where it is open."""
    from PIL import Image

    channels = image.shape[0]
    array = image.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(array[:, :, 0] if channels == 1 else array)
    picture = picture.resize((width, height), Image.Resampling.NEAREST)
    if channels in (1, 3):
        return picture.convert("RGB")
    page = _checkerboard(width, height)
    page.paste(picture.convert("RGB"), mask=picture.getchannel("A"))
    return page


def _checkerboard(width: int, height: int) -> Any:
    from PIL import Image, ImageDraw

    size = max(4, min(width, height) // 16)
    page = Image.new("RGB", (width, height), CHECKER[0])
    draw = ImageDraw.Draw(page)
    for row in range(-(-height // size)):
        for column in range(row % 2, -(-width // size), 2):
            corner = (column * size, row * size)
            draw.rectangle((*corner, corner[0] + size - 1, corner[1] + size - 1), CHECKER[1])
    return page


def _legend(page: Any, draw: Any, text: Any, left: int, top: int, width: int, most: float) -> None:
    """A colour scale from 0 to the most under a column."""
    from PIL import Image

    label = f"{most:.0f}" if 100 <= most < 1e6 else f"{most:.2g}"
    zero, end = math.ceil(text.getlength("0")), math.ceil(text.getlength(label))
    room = max(8, width - zero - end - 2 * GAP)
    high = max(6, text.size // 2)
    shares = torch.linspace(0, 1, room, dtype=torch.float64).expand(high, room)
    bar = Image.fromarray(_colours(shares).numpy())
    middle = top + sum(text.getmetrics()) // 2
    start = left + zero + GAP
    draw.text((left, middle), "0", SOFT, text, anchor="lm")
    page.paste(bar, (start, middle - high // 2))
    corner = (start + room, middle - high // 2 + high)
    draw.rectangle((start - 1, middle - high // 2 - 1, *corner), outline=LINE)
    draw.text((start + room + GAP, middle), label, SOFT, text, anchor="lm")


def _font(size: int) -> Any:
    """The typeface of our other pictures, which comes with matplotlib."""
    import matplotlib
    from PIL import ImageFont

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(file), size)


def _check(columns: Sequence[Column]) -> None:
    if not columns:
        raise ValueError("a sheet needs at least one column")
    for title, images, _ in columns:
        if images.ndim != 4 or images.dtype != torch.uint8 or images.shape[1] not in (1, 2, 3, 4):
            raise ValueError(
                f"column {title!r} of a sheet needs uint8 images (N, C, H, W) of 1 to 4 channels, "
                f"got {images.dtype} of shape {tuple(images.shape)}"
            )
        if len(images) != len(columns[0].images):
            raise ValueError(
                f"column {title!r} of a sheet has {len(images)} rows, and "
                f"{columns[0].title!r} has {len(columns[0].images)}"
            )


__all__ = ["Column", "Heat", "sheet", "uncertainty", "veiled"]
