"""Pictures of items and curves: grids of images, scatters of points, curves of signals."""

from __future__ import annotations

import math
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


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=110)
