"""Pictures of items and curves: grids of images, scatters of points, curves of signals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INK, ACCENT, SOFT = "#1f2a44", "#d1495b", "#8d99ae"


def tile(images: Tensor, columns: int | None = None, scale: int = 1) -> Any:
    """A PIL image of a grid of ``(N, C, H, W)`` uint8 images, C of 1, 3 or 4, one pixel apart."""
    from PIL import Image

    n, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = -(-n // columns)
    canvas = torch.full((channels, rows * (height + 1) + 1, columns * (width + 1) + 1), 32)
    canvas = canvas.to(torch.uint8)
    for i, image in enumerate(images.cpu()):
        y, x = divmod(i, columns)
        top, left = y * (height + 1) + 1, x * (width + 1) + 1
        canvas[:, top : top + height, left : left + width] = image
    array = canvas.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[:, :, 0] if channels == 1 else array)
    return picture.resize(
        (picture.width * scale, picture.height * scale), Image.Resampling.NEAREST
    )


def as_images(pixels: Tensor) -> Tensor | None:
    """Items as ``(N, C, H, W)`` with 1, 3 or 4 channels, or None where they are no pictures.

    A volume shows its middle slice; an image of other channel counts shows its first channel.
    """
    if pixels.ndim == 5:
        pixels = pixels[:, :, pixels.shape[2] // 2]
    if pixels.ndim != 4:
        return None
    return pixels if pixels.shape[1] in (1, 3, 4) else pixels[:, :1]


def save_items(file: Path, pixels: Tensor, reference: Tensor | None = None) -> None:
    """A picture of items of any shape.

    Images and volumes become a grid (uint8 expected), points of two or more dimensions a scatter
    of the first two, over the reference data; signals become curves.
    """
    images = as_images(pixels)
    if images is not None:
        side = max(images.shape[2:])
        tile(images, scale=max(1, 64 // side)).save(file)
        return
    figure, axes = _figure(5, 5)
    values = pixels.float().cpu()
    if values.ndim == 2 and values.shape[1] >= 2:
        if reference is not None:
            axes.scatter(*reference.float().cpu()[:, :2].T, s=3, c=SOFT, alpha=0.4, label="data")
        axes.scatter(*values[:, :2].T, s=3, c=ACCENT, alpha=0.6, label="samples")
        axes.set_aspect("equal", "datalim")
        axes.legend(frameon=False, markerscale=4)
    else:
        for row in values.flatten(1)[:16]:
            axes.plot(row, linewidth=1)
    _save(figure, file)


def save_way(file: Path, ends: Tensor, way: Tensor) -> None:
    """A way ``(count, D)`` between two points ``(2, D)``, D >= 2: the first two dimensions."""
    figure, axes = _figure(5, 5)
    points = way.float().cpu()[:, :2]
    axes.plot(*points.T, c=ACCENT, linewidth=1, marker="o", markersize=4, label="the way")
    for name, point in zip("AB", ends.float().cpu()[:, :2].tolist(), strict=True):
        axes.scatter(*point, s=70, facecolors="none", edgecolors=INK)
        axes.annotate(name, point, (7, 7), textcoords="offset points", color=INK)
    axes.set_aspect("equal", "datalim")
    axes.legend(frameon=False)
    _save(figure, file)


def save_draws(
    file: Path,
    draws: Tensor,
    given: Sequence[tuple[str, Tensor]] = (),
    known: Tensor | None = None,
    shown: int = 8,
) -> None:
    """Several draws of each of some points or signals, beside what was known of them.

    Points of two entries are scattered, a panel an item. All else is drawn as curves, a row an
    item and a panel a channel: some draws, their mean, and a band of two standard deviations.

    Args:
        file: .png.
        draws: ``(N, draws, *shape)``, in units of the data.
        given: what stood before the draws, pairs of a title and items ``(N, *shape)``.
        known: bool, which entries of the first of ``given`` were known, ``(N, *shape)`` or a shape
            that broadcasts to it: marked as points, or as lines where it is one entry of two.
        shown: draws that are shown as curves of their own.
    """
    draws = draws.double().cpu()
    before = [(title, x.double().cpu()) for title, x in given]
    where = None if known is None else known.cpu().expand(len(draws), *draws.shape[2:])
    n, planar = len(draws), tuple(draws.shape[2:]) == (2,)
    channels = 1 if planar or draws.ndim == 3 else min(4, draws.shape[2])
    wide, high = (4.2, 4.2) if planar else (6.4 / min(channels, 2) + 1, 2.6)
    across, down = (min(n, 4), -(-n // 4)) if planar else (channels, n)
    figure, axes = _figure(wide * across, high * down, down, across)
    for i in range(n):
        rows = [(title, x[i]) for title, x in before]
        seen = None if where is None else where[i]
        if planar:
            _cloud(axes[i // 4][i % 4], draws[i], rows, seen)
            continue
        lines = draws[i].reshape(draws.shape[1], -1, draws.shape[-1])
        for c in range(channels):
            parts = [(t, x.reshape(-1, x.shape[-1])[c]) for t, x in rows]
            there = None if seen is None else seen.reshape(-1, seen.shape[-1])[c]
            _curves(axes[i][c], lines[:, c], parts, there, shown)
    for part in axes.flat:
        part.set_visible(part.has_data())
    axes[0][0].legend(frameon=False, fontsize=9)
    _save(figure, file)


def _cloud(
    axes: Any, draws: Tensor, given: Sequence[tuple[str, Tensor]], known: Tensor | None
) -> None:
    """Draws of a point ``(draws, 2)``, and what was given."""
    axes.scatter(*draws.T, s=9, c=ACCENT, alpha=0.6, linewidths=0, label="draws")
    for k, (title, point) in enumerate(given):
        held = known if k == 0 and known is not None else torch.ones(2, dtype=torch.bool)
        colour = SOFT if k else INK
        if bool(held.all()):
            axes.scatter(*point, s=80, facecolors="none", edgecolors=colour, label=title)
        elif bool(held[0]):
            axes.axvline(float(point[0]), linewidth=1.2, color=colour, label=title)
        elif bool(held[1]):
            axes.axhline(float(point[1]), linewidth=1.2, color=colour, label=title)
    axes.set_aspect("equal", "datalim")


def _curves(
    axes: Any,
    draws: Tensor,
    given: Sequence[tuple[str, Tensor]],
    known: Tensor | None,
    shown: int,
) -> None:
    """Draws of a curve ``(draws, L)``, and what was given."""
    mean, place = draws.mean(0), torch.arange(draws.shape[1])
    if len(draws) > 1:
        half = 2 * draws.std(0)
        axes.fill_between(
            place, mean - half, mean + half, color=ACCENT, alpha=0.15, linewidth=0,
            label="mean ± 2 std",
        )  # fmt: skip
        axes.plot(mean, color=ACCENT, linewidth=1.8, label="mean")
    for k, row in enumerate(draws[:shown]):
        axes.plot(row, color=ACCENT, linewidth=0.7, alpha=0.5, label=None if k else "draws")
    for k, (title, row) in enumerate(given):
        if k == 0 and known is not None:
            axes.plot(place[known], row[known], "o", color=INK, markersize=3.5, label=title)
        else:
            colour, dashes = (SOFT, ":") if k else (INK, "--")
            axes.plot(row, label=title, color=colour, linewidth=1.2, linestyle=dashes)
    axes.margins(x=0.01)


def _figure(width: float, height: float, rows: int = 0, columns: int = 0) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(rows, 1), max(columns, 1), squeeze=False)
    for part in axes.flat:
        part.spines[["top", "right"]].set_visible(False)
    return figure, axes if rows else axes[0][0]


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=110)
