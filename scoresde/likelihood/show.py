"""Likelihoods as pictures: the most and the least likely items, and histograms of data sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..config import unknown
from ..pictures import INK, as_images

COLOURS = ("#1f2a44", "#d1495b", "#2a9d8f", "#e9a03b", "#7b5ea7", "#4a90c2")
GREY = "#5c677d"
BINS = 80
"""At most so many bins, on the range of all values."""


def extremes(
    images: Tensor,
    values: Tensor,
    file: Path,
    *,
    unit: str = "bits/dim",
    likely: str = "low",
    columns: int = 8,
    rows: int = 1,
    digits: int = 3,
) -> None:
    """A picture of the most likely items over the least likely, each with its value and index.

    Args:
        images: all items, uint8, ``(N, C, H, W)`` as from ``scaler.image``, or volumes.
        values: one an item, ``(N,)``; an item whose value is not finite is left out.
        file: PNG to write.
        unit: of the values.
        likely: ``"low"`` if low values are the likely ones (bits/dim), ``"high"`` (nats).
        columns: items in a row, >= 1; fewer if there are not enough items for both ends.
        rows: of each end, >= 1.
        digits: after the decimal point.

    Raises:
        ValueError: items that are no pictures, or sizes that do not fit.
    """
    shown = as_images(images)
    if shown is None or len(values) != len(shown) or columns < 1 or rows < 1:
        raise ValueError(
            "extremes needs images (N, C, H, W), as many values, columns >= 1 and rows >= 1, got "
            f"{tuple(images.shape)}, {tuple(values.shape)}, columns={columns} and rows={rows}"
        )
    if likely not in ("low", "high"):
        raise unknown("end", likely, ("low", "high"))
    known = values.isfinite().nonzero()[:, 0]
    order = known[values[known].argsort(stable=True, descending=likely == "high")].tolist()
    if len(order) < 2:
        raise ValueError(f"extremes needs two items with finite values, got {len(order)}")
    columns = min(columns, len(order) // 2)
    rows = min(rows, len(order) // 2 // columns)
    count = rows * columns
    figure = _figure(0.2 + 1.1 * columns, 0.3 + 2.9 * rows + 0.4)
    ends = figure.subfigures(2, 1)
    # The least likely come last in the order, and first in their row.
    for end, title, chosen in zip(
        ends, ("most likely", "least likely"), (order[:count], order[::-1][:count]), strict=True
    ):
        end.suptitle(f"{title} ({unit}, #item)", fontsize=9, color=INK, x=0.01, ha="left")
        for axes, item in zip(
            end.subplots(rows, columns, squeeze=False).flat, chosen, strict=True
        ):
            axes.imshow(
                _pixels(shown[item]), cmap="gray", vmin=0, vmax=255, interpolation="nearest"
            )
            axes.set_title(f"{float(values[item]):.{digits}f}", fontsize=9, pad=2)
            axes.set_xlabel(f"#{item}", fontsize=7, color=GREY, labelpad=1)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
    figure.savefig(file, dpi=110)


def histogram(
    series: Mapping[str, Tensor],
    file: Path,
    xlabel: str,
    auroc: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """A picture of the distributions of values of data sets, on common bins.

    Args:
        series: name to values, ``(N,)`` each; values that are not finite are left out and counted.
        file: PNG to write.
        xlabel: what the values are, with their unit.
        auroc: name of a score to its area under the curve and standard error, to be written.

    Raises:
        ValueError: a series without a finite value, or none.
    """
    found = {name: values.detach().double().cpu().numpy() for name, values in series.items()}
    finite = {name: values[np.isfinite(values)] for name, values in found.items()}
    empty = [name for name, values in finite.items() if values.size == 0]
    if empty or not finite:
        raise ValueError(
            f"a histogram needs finite values, got none of {', '.join(empty) or 'any'}"
        )
    everything = np.concatenate(list(finite.values()))
    narrowest = min(_width(values) for values in finite.values())
    span = float(np.ptp(everything))
    bins = min(BINS, max(10, round(span / narrowest))) if narrowest > 0 else 10
    edges = np.histogram_bin_edges(everything, bins=bins)
    figure = _figure(7, 4)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    for i, (name, values) in enumerate(finite.items()):
        colour = COLOURS[i % len(COLOURS)]
        lost = len(found[name]) - len(values)
        label = f"{name}: {values.mean():.3f} on average, {len(values)} items"
        label += f", {lost} not finite" if lost else ""
        look: dict[str, Any] = {"bins": edges, "density": True, "color": colour}
        axes.hist(values, histtype="stepfilled", alpha=0.25, **look)
        axes.hist(values, histtype="step", linewidth=1.4, label=label, **look)
        axes.axvline(values.mean(), color=colour, linewidth=1.0, linestyle=(0, (4, 2)))
    axes.set_xlabel(xlabel)
    axes.set_ylabel("density of items")
    figure.legend(loc="outside upper left", frameon=False, fontsize=9, ncols=1)
    if auroc:
        lines = [f"AUROC by {k}: {area:.4f} ± {error:.4f}" for k, (area, error) in auroc.items()]
        figure.supxlabel("     ".join(lines), fontsize=9, color=GREY, x=0.01, ha="left")
    figure.savefig(file, dpi=110)


def _width(values: np.ndarray) -> float:
    """The bin width of Freedman and Diaconis; of the range where the quartiles agree."""
    low, high = np.quantile(values, (0.25, 0.75))
    return float(2 * (high - low) or np.ptp(values)) / len(values) ** (1 / 3)


def _pixels(image: Tensor) -> np.ndarray:
    """``(C, H, W)`` as matplotlib takes it."""
    array = image.cpu().permute(1, 2, 0).numpy()
    return array[:, :, 0] if array.shape[2] == 1 else array


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
