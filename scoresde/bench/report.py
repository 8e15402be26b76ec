"""A comparison on paper: a table, CSV, JSON, and a plot of error against evaluations."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .engine import Row

MEASURES = {
    "endpoint_rms": "endpoint RMS",
    "sliced_w2": "sliced W2",
    "mmd2": "MMD^2",
    "mean_error": "mean error",
    "covariance_error": "cov. error",
}
DISTANCES = ("sliced_w2", "mmd2")
AXES = {
    "endpoint_rms": "RMS distance to the converged ODE solution",
    "sliced_w2": "sliced Wasserstein-2 distance",
    "mmd2": "squared MMD (on the axis: below it, or negative)",
    "covariance_error": "relative error of the covariance",
}
COLOURS = ("#1f2a44", "#d1495b", "#2a9d8f", "#e9a03b", "#7b5ea7", "#4a90c2", "#8a6d3b", "#c2588f")
MARKERS = "osD^vP*X"
SOFT = "#8d99ae"
MESSAGE = 60


def within(row: Row, floor: Mapping[str, float]) -> bool:
    """Whether neither distance of a row to the reference is above its floor.

    The moments have no vote: each more test at 5 % would turn away more rows that are right.
    """
    return row.converged and all(
        (value := getattr(row, key)) is not None and value <= floor[key] for key in DISTANCES
    )


def table(rows: Sequence[Row], floor: Mapping[str, float]) -> str:
    """The rows as aligned text, the floor below them; ``*`` marks a value not above its floor."""
    shown = [k for k in MEASURES if any(getattr(row, k) is not None for row in rows)]
    lines = [["solver", "steps", "NFE", "seconds", *(MEASURES[k] + " " for k in shown), ""]]
    for row in rows:
        cells = [
            row.solver,
            "own" if row.steps is None else str(row.steps),
            "-" if row.nfe is None else str(row.nfe),
            "-" if row.seconds is None else f"{row.seconds:.3g}",
        ]
        for key in shown:
            value = getattr(row, key)
            low = value is not None and key in floor and value <= floor[key]
            cells.append(("-" if value is None else _short(value)) + ("*" if low else " "))
        lines.append([*cells, _note(row)])
    if any(key in floor for key in shown):
        under = [_short(floor[k]) + " " if k in floor else " " for k in shown]
        lines.append(["floor", "", "", "", *under, "real items among themselves, 95 %"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        middle = (cell.rjust(w) for cell, w in zip(line[1:-1], widths[1:-1], strict=True))
        text.append("  ".join([line[0].ljust(widths[0]), *middle, line[-1]]).rstrip())
    text.insert(1, "-" * max(map(len, text[: len(rows) + 1])))
    return "\n".join(text)


def verdict(rows: Sequence[Row], floor: Mapping[str, float]) -> str:
    """The row that reaches the floor in both distances with the fewest evaluations, in a line."""
    good = [row for row in rows if within(row, floor) and row.nfe is not None]
    if not good:
        return "no row reaches the floor in both distances"
    best = min(good, key=lambda row: row.nfe or 0)
    steps = "its own steps" if best.steps is None else f"{best.steps} steps"
    found = f"{best.solver}, {steps}, NFE {best.nfe}"
    return f"fewest evaluations at the floor in both distances: {found}"


def write(
    folder: Path, rows: Sequence[Row], floor: Mapping[str, float], content: Mapping[str, Any]
) -> None:
    """Writes ``bench.csv``, ``bench.json`` and ``bench.png``; ``content`` goes into the JSON.

    Its ``title`` and ``unit`` (of the sliced distance) also go onto the plot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "bench.csv", "w", newline="") as handle:
        sheet = csv.writer(handle)
        names = [f.name for f in fields(Row)]
        sheet.writerow([*names, *(f"{key}_floor" for key in floor)])
        for row in rows:
            values = [getattr(row, name) for name in names]
            sheet.writerow(["" if v is None else v for v in (*values, *floor.values())])
    draft = folder / ".bench.json.draft"
    draft.write_text(json.dumps(record(rows, floor, content), indent=2) + "\n")
    os.replace(draft, folder / "bench.json")
    plot(folder / "bench.png", rows, floor, str(content["title"]), str(content["unit"]))


def record(
    rows: Sequence[Row], floor: Mapping[str, float], content: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything as plain values for JSON: the content, the floor and the rows."""
    return {**content, "floor": dict(floor), "rows": [asdict(row) for row in rows]}


def plot(
    file: Path, rows: Sequence[Row], floor: Mapping[str, float], title: str, unit: str
) -> None:
    """Errors against evaluations on logarithmic axes, a line a solver, floors dashed.

    Solvers that choose their steps are single points, runs that did not converge are hollow, and
    values below the bottom (MMD^2 may be negative) lie on it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [k for k in AXES if any(_drawn(row, k) for row in rows)] or list(AXES)[:1]
    columns = len(shown) if len(shown) <= 3 else 2
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(1 + 4.6 * columns, 1 + 3.5 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in panels[len(shown) :]:
        axes.remove()
    for axes, key in zip(panels, shown, strict=False):
        _panel(axes, rows, key, floor.get(key))
        in_unit = f" ({unit})" if key == "sliced_w2" else ""
        axes.set_title(AXES[key] + in_unit, fontsize=10, loc="left")
        axes.set_xlabel("evaluations of the score for a sample (NFE)", fontsize=9)
    figure.suptitle(title, fontsize=10, color="#555555", x=0.01, ha="left")
    found = {h.get_label(): h for axes in panels for h in axes.get_legend_handles_labels()[0]}
    handles = [found[name] for name in dict.fromkeys(row.solver for row in rows) if name in found]
    if handles:
        deep = -(-len(handles) // (3 * columns))
        figure.legend(
            handles=handles, loc="outside lower left", frameon=False, fontsize=9,
            ncols=-(-len(handles) // deep),
        )  # fmt: skip
    figure.savefig(file, dpi=130)


def _panel(axes: Any, rows: Sequence[Row], key: str, floor: float | None) -> None:
    """The lines of one measure and its floor."""
    values = [getattr(row, key) for row in rows if _drawn(row, key)]
    positive = [v for v in values if v > 0]
    if floor is not None and floor > 0:
        # Far below its floor a value is noise, and would only squeeze the rest.
        bottom = 0.7 * min([floor, *(max(v, floor / 4) for v in positive)])
    else:
        bottom = 0.7 * min(positive, default=1.0)
    for i, name in enumerate(dict.fromkeys(row.solver for row in rows)):
        own = [row for row in rows if row.solver == name and _drawn(row, key)]
        own.sort(key=lambda row: row.nfe or 0)
        if not own:
            continue
        x = [row.nfe for row in own]
        y = [max(getattr(row, key), bottom) for row in own]
        look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)],
                "markersize": 5.5, "linewidth": 1.6, "clip_on": False}  # fmt: skip
        axes.plot(x, y, label=name, zorder=3, **look)
        for row, a, b in zip(own, x, y, strict=True):
            if not row.converged:
                axes.plot(a, b, markerfacecolor="white", zorder=4, **look)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=bottom)
    _ticks(axes.xaxis, *axes.get_xlim())
    _ticks(axes.yaxis, *axes.get_ylim())
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#e6e8ee", linewidth=0.8)
    axes.set_axisbelow(True)
    if floor is not None:
        axes.axhline(floor, color=SOFT, linestyle="--", linewidth=1.3, zorder=2)
        axes.annotate(
            "floor: real items, 95 %", (0.01, floor), ha="left", va="bottom",
            xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points",
            color="#5c677d", fontsize=8,
        )  # fmt: skip


def _ticks(axis: Any, low: float, high: float) -> None:
    """Plain numbers, as many a decade as the range has room for."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    subs: tuple[float, ...] = (1.0,) if high / low > 200 else (1.0, 2.0, 5.0)
    if high / low < 8:
        subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())


def _drawn(row: Row, key: str) -> bool:
    value = getattr(row, key)
    return value is not None and row.nfe is not None and math.isfinite(value)


def _short(value: float) -> str:
    return f"{value:.3g}"


def _note(row: Row) -> str:
    note = row.message if row.converged else f"not converged: {row.message}"
    if row.nfe is None:
        note = f"failed: {row.message}"
    return note if len(note) <= MESSAGE else note[: MESSAGE - 3] + "..."
