"""A comparison as a picture: error against evaluations, a panel for each problem and measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .row import MEASURES, Measure, Row
from .text import Floors

COLOURS = ("#1f2a44", "#d1495b", "#2a9d8f", "#e9a03b", "#7b5ea7", "#4a90c2", "#8a6d3b", "#c2588f")
MARKERS = "osD^vP*X"
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
SOFT = "#8d99ae"
DRAWN = ("endpoint_rms", "sliced_w2", "mmd2", "covariance_error")
SEVERAL = ("endpoint_rms", "sliced_w2")
"""What is drawn of several problems, a line of panels each."""
PROBLEMS = 8
"""At most so many problems are drawn; the page has all."""
Name = tuple[str, str | None]


def plot(
    pictures: Sequence[Path], rows: Sequence[Row], floors: Floors, title: str, unit: str
) -> None:
    """Errors against evaluations on logarithmic axes, a line a solver and grid, floors dashed.

    Bars are 95 % intervals. Solvers that choose their steps are single points, runs that did not
    converge are hollow, and values below the bottom (MMD^2 may be negative) lie on it.

    Args:
        pictures: files to write; the ending says the format.
        rows: of one problem or several.
        floors: for each law, the floor of each measure.
        title: of the whole.
        unit: of the sliced distance.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(rows)
    columns = min(len(panels), 3 if len({row.case for row in rows}) == 1 else 2)
    columns = 2 if len(panels) == 4 else columns
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(1 + 4.6 * columns, 1 + 3.5 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in places[len(panels) :]:
        axes.remove()
    looks = _looks(rows)
    several = len({row.case for row in rows}) > 1
    for axes, (case, measure) in zip(places, panels, strict=False):
        own = [row for row in rows if row.case == case]
        _panel(axes, own, measure, floors.get(case[1], {}).get(measure.key), looks)
        in_unit = f" ({unit})" if measure.in_units else ""
        where = f"{case[0]}, {case[1]}\n" if several else ""
        axes.set_title(where + measure.title + in_unit, fontsize=10, loc="left")
        axes.set_xlabel("evaluations of the score for a sample (NFE)", fontsize=9)
    figure.suptitle(title, fontsize=10, color="#555555", x=0.01, ha="left")
    _legend(figure, places[: len(panels)], looks, columns)
    # No date and no random names in the SVG: the same rows give the same file.
    with rc_context({"svg.hashsalt": "scoresde"}):
        for picture in pictures:
            svg = picture.suffix == ".svg"
            figure.savefig(picture, dpi=130, metadata={"Date": None} if svg else None)
            figure.set_layout_engine("none")  # found by the first, and slow to find again


def _panels(rows: Sequence[Row]) -> list[tuple[tuple[str, str], Measure]]:
    """What to draw: the measures of one problem, or the main ones of several."""
    cases = list(dict.fromkeys(row.case for row in rows))
    wanted = DRAWN if len(cases) == 1 else SEVERAL
    measures = [m for m in MEASURES if m.key in wanted]
    found = [
        (case, m) for case in cases[:PROBLEMS] for m in measures
        if any(_drawn(row, m.key) for row in rows if row.case == case)
    ]  # fmt: skip
    return found or [(cases[0] if cases else ("", ""), measures[0])]


def _looks(rows: Sequence[Row]) -> dict[Name, dict[str, Any]]:
    """A colour and a marker for each solver, a dash for each of its grids."""
    names = list(dict.fromkeys((row.solver, row.grid) for row in rows))
    solvers = list(dict.fromkeys(solver for solver, _ in names))
    looks = {}
    for name in names:
        i = solvers.index(name[0])
        j = [grid for solver, grid in names if solver == name[0]].index(name[1])
        looks[name] = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
            "linestyle": DASHES[j % len(DASHES)],
        }
    return looks


def _legend(figure: Any, places: Any, looks: Mapping[Name, Any], columns: int) -> None:
    found = {}
    for axes in places:
        found.update({h.get_label(): h for h in axes.get_legend_handles_labels()[0]})
    texts = [_text(name, looks) for name in looks]
    handles = [found[text] for text in texts if text in found]
    if handles:
        deep = -(-len(handles) // (3 * columns))
        figure.legend(
            handles=handles, loc="outside lower left", frameon=False, fontsize=9,
            ncols=-(-len(handles) // deep),
        )  # fmt: skip


def _text(name: Name, looks: Mapping[Name, Any]) -> str:
    """The solver's name, with the grid's if it ran on several."""
    several = sum(solver == name[0] for solver, _ in looks) > 1
    return f"{name[0]}, {name[1]}" if several else name[0]


def _panel(
    axes: Any,
    rows: Sequence[Row],
    measure: Measure,
    floor: float | None,
    looks: Mapping[Name, Any],
) -> None:
    """The lines of one measure and its floor."""
    key = measure.key
    positive = [v for row in rows if _drawn(row, key) and (v := getattr(row, key)) > 0]
    bottom = 0.7 * min(positive, default=1.0)
    if floor is not None and floor > 0:
        # Far below its floor a value is noise, and would only squeeze the rest.
        bottom = 0.7 * min([floor, *(max(v, floor / 4) for v in positive)])
    for name, look in looks.items():
        own = [r for r in rows if (r.solver, r.grid) == name and _drawn(r, key)]
        own.sort(key=lambda row: row.nfe or 0)
        if not own:
            continue
        x = [row.nfe for row in own]
        y = [max(getattr(row, key), bottom) for row in own]
        full = {**look, "markersize": 5.5, "linewidth": 1.6, "clip_on": False}
        axes.plot(x, y, label=_text(name, looks), zorder=3, **full)
        for row, a, b in zip(own, x, y, strict=True):
            if key in row.intervals:
                low, high = (max(end, bottom) for end in row.intervals[key])
                axes.vlines(a, low, high, color=look["color"], linewidth=1.1, zorder=2)
            if not row.converged:
                axes.plot(a, b, markerfacecolor="white", zorder=4, **full)
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
        _line(axes, floor, "floor: real items, 95 %", "--")
    error = next((r.reference_error for r in rows if r.reference_error is not None), None)
    if measure.of_path and error is not None and error > bottom:
        _line(axes, error, "error of the reference itself", ":")


def _line(axes: Any, height: float, text: str, style: str) -> None:
    axes.axhline(height, color=SOFT, linestyle=style, linewidth=1.3, zorder=2)
    axes.annotate(
        text, (0.01, height), ha="left", va="bottom", xycoords=("axes fraction", "data"),
        xytext=(0, 2), textcoords="offset points", color="#5c677d", fontsize=8,
    )  # fmt: skip


def _ticks(axis: Any, low: float, high: float) -> None:
    """Plain numbers, as many a decade as the range has room for."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    subs: tuple[float, ...] = (1.0,) if high / low > 200 else (1.0, 2.0, 5.0)
    if high / low < 8:
        subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_locator(NullLocator())


def _drawn(row: Row, key: str) -> bool:
    return row.value(key) is not None and row.nfe is not None
