"""Curves and bars in a terminal: in blocks where it shows them, else in plain ASCII."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

WIDEST = 100
BLOCKS = " ▁▂▃▄▅▆▇█"
PLAIN = " .:|"
Curve = tuple[Sequence[float], Sequence[float]]


def width() -> int:
    """Columns to write into: those of the terminal, 80 without one, and no more than 100."""
    return max(40, min(shutil.get_terminal_size((80, 24)).columns - 1, WIDEST))


def blocks(stream: TextIO | None = None) -> bool:
    """Whether a stream, by default the standard output, is a terminal that shows blocks."""
    stream = stream or sys.stdout
    encoding = (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "")
    return stream.isatty() and encoding in ("utf8", "utf8sig")


def chart(
    curves: Mapping[str, Curve], columns: int, rows: int, shades: str, long: bool = False
) -> list[str]:
    """The first curve as a filled area and the second as ``o`` upon it, in lines of text.

    The vertical axis is logarithmic where all values are positive.

    Args:
        curves: steps and values by name, one or two.
        columns: width of the text.
        rows: height of the area.
        shades: the fillings of a cell, from empty to full.
        long: whether the axis of steps is logarithmic.
    """
    if long:
        curves = {k: ([math.log(max(s, 1)) for s in c[0]], c[1]) for k, c in curves.items()}
    known = {name: pair for name, pair in curves.items() if len(pair[0])}
    values = [v for _, column in known.values() for v in column]
    steps = [s for column, _ in known.values() for s in column]
    if not values:
        return []
    log = min(values) > 0
    low, high = (_height(f(values), log) for f in (min, max))
    labels = [f"{_value(low + (high - low) * r / (rows - 1), log):.3g}" for r in range(rows)]
    labels = ["" if 0 < r < rows - 1 and r != rows // 2 else a for r, a in enumerate(labels)]
    margin = max(map(len, labels)) + 2
    across = columns - margin
    first, last = min(steps), max(steps)
    fills, marks = (
        _columns(known.get(name), across, first, last, log, low, high) for name in _two(curves)
    )
    for k in range(1, across):  # the area has no holes between rows of the log
        fills[k] = fills[k - 1] if fills[k] is None else fills[k]
    lines = []
    for r in reversed(range(rows)):
        cells = [_cell(None if v is None else max(v, 1e-3) * rows - r, shades) for v in fills]
        for k, v in enumerate(marks):
            if v is not None and min(int(v * rows), rows - 1) == r:
                cells[k] = "o"
        lines.append(f"{labels[r]:>{margin - 2}} |{''.join(cells).rstrip()}")
    ends = f"step {_value(first, long):.0f}", f"{_value(last, long):.0f}"
    lines.append(" " * margin + ends[0] + ends[1].rjust(across - len(ends[0])))
    return lines


def bar(value: float, full: float, columns: int, shades: str) -> str:
    """A horizontal bar, of all columns where the value is ``full``."""
    solid = "█" if shades == BLOCKS else "#"
    return solid * max(1, round(columns * min(value / full, 1.0))) if full > 0 else ""


def _two(curves: Mapping[str, Curve]) -> tuple[str, str]:
    names = [*curves, "", ""]
    return names[0], names[1]


def _height(value: float, log: bool) -> float:
    return math.log(value) if log else value


def _value(height: float, log: bool) -> float:
    return math.exp(height) if log else height


def _columns(
    curve: Curve | None, count: int, first: float, last: float, log: bool, low: float, high: float
) -> list[float | None]:
    """Mean heights, from 0 to 1, of what falls into each column; None where nothing does."""
    found: list[list[float]] = [[] for _ in range(count)]
    for step, value in zip(*(curve or ((), ())), strict=True):
        place = (step - first) / (last - first) if last > first else 0.0
        height = (_height(value, log) - low) / (high - low) if high > low else 0.5
        found[min(int(place * count), count - 1)].append(height)
    return [sum(each) / len(each) if each else None for each in found]


def _cell(fill: float | None, shades: str) -> str:
    """A cell that is filled to a height; above 1 it is full."""
    if fill is None:
        return " "
    level = math.ceil(fill * (len(shades) - 1))
    return shades[max(0, min(level, len(shades) - 1))]
