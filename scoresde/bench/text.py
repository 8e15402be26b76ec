"""A comparison in the terminal: a table for each problem, and a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .intervals import spread
from .row import DISTANCES, MEASURES, Row

MESSAGE = 60
BELOW_REFERENCE = 3.0
"""An endpoint error below so many errors of the reference says little about the solver."""
LEFT_OUT = ("endpoint_median",)
"""Measures for which a terminal has no room; every file has them."""
Floors = Mapping[str, Mapping[str, float]]
"""For each law, the floor of each measure."""


def within(row: Row, floor: Mapping[str, float]) -> bool:
    """Whether neither distance of a row to the reference is above its floor.

    The moments have no vote: each more test at 5 % would turn away more rows that are right.
    """
    return row.converged and all(
        (value := row.value(key)) is not None and key in floor and value <= floor[key]
        for key in DISTANCES
    )


def doubtful(row: Row, key: str) -> bool:
    """Whether an error is too close to that of the reference itself to be believed."""
    value, error = row.value(key), row.reference_error
    of_path = any(m.key == key and m.of_path for m in MEASURES)
    return of_path and value is not None and error is not None and value < BELOW_REFERENCE * error


def report(rows: Sequence[Row], floors: Floors) -> str:
    """Every problem's table under its name, and its verdict; the legend below all."""
    parts = []
    cases = list(dict.fromkeys(row.case for row in rows))
    for case in cases:
        own = [row for row in rows if row.case == case]
        floor = floors.get(case[1], {})
        head = f"{case[0]}, {case[1]}\n" if len(cases) > 1 else ""
        parts.append(f"{head}{table(own, floor)}\n{verdict(own, floor)}")
    legend = "* not above the floor"
    if any(row.intervals for row in rows):
        legend += "    +- 95 % interval, its longer side"
    errors = [row.reference_error for row in rows if row.reference_error is not None]
    if errors:
        legend += f"    reference error {max(errors):.1e}, ~ below {BELOW_REFERENCE:g} times that"
    return "\n\n".join([*parts, legend])


def table(rows: Sequence[Row], floor: Mapping[str, float]) -> str:
    """The rows of one problem as aligned text, the floor below them.

    ``*`` marks a value not above its floor, ``~`` one that is not far above the error of the
    reference solution, ``+-`` the longer side of an interval.
    """
    shown = [
        m for m in MEASURES
        if m.key not in LEFT_OUT and any(row.value(m.key) is not None for row in rows)
    ]  # fmt: skip
    grids = any(row.grid for row in rows)
    ratio = any(row.vs_best is not None for row in rows)
    names = [m.name + " " for m in shown] + (["vs best"] if ratio else [])
    lines = [["solver", *(["grid"] if grids else []), "steps", "NFE", "seconds", *names, ""]]
    for row in rows:
        cells = [
            row.solver,
            *([row.grid or "own"] if grids else []),
            "own" if row.grid is None else "-" if row.steps is None else str(row.steps),
            "-" if row.nfe is None else f"{row.nfe:g}",
            "-" if row.seconds is None else f"{row.seconds:.3g}",
            *(_cell(row, m.key, floor) for m in shown),
        ]
        if ratio:
            cells.append("-" if row.vs_best is None else f"{row.vs_best:.3g}")
        lines.append([*cells, _note(row)])
    if any(m.key in floor for m in shown):
        blank = [""] * (4 if grids else 3)
        under = [f"{floor[m.key]:.3g} " if m.key in floor else " " for m in shown]
        last = "real items among themselves, 95 %"
        lines.append(["floor", *blank, *under, *([""] if ratio else []), last])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = 2 if grids else 1
    text = []
    for line in lines:
        cells = [
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line[:-1], widths[:-1], strict=True))
        ]
        text.append("  ".join([*cells, line[-1]]).rstrip())
    text.insert(1, "-" * max(len(line) for line in text[:1]))
    return "\n".join(text)


def verdict(rows: Sequence[Row], floor: Mapping[str, float]) -> str:
    """The row that reaches the floor in both distances with the fewest evaluations, in a line."""
    good = [row for row in rows if within(row, floor) and row.nfe is not None]
    if not good:
        return "no row reaches the floor in both distances"
    best = min(good, key=lambda row: row.nfe or 0)
    steps = "its own steps" if best.steps is None else f"{best.steps} steps"
    grid = f", {best.grid}" if best.grid else ""
    found = f"{best.solver}{grid}, {steps}, NFE {best.nfe:g}"
    return f"fewest evaluations at the floor in both distances: {found}"


def _cell(row: Row, key: str, floor: Mapping[str, float]) -> str:
    value = row.value(key)
    if value is None:
        return "- "
    mark = "*" if key in floor and value <= floor[key] else "~" if doubtful(row, key) else " "
    half = ""
    if key in row.intervals:
        half = f" +-{spread(value, row.intervals[key]):.1g}"
    return f"{value:.3g}{half}{mark}"


def _note(row: Row) -> str:
    note = row.message if row.converged else f"not converged: {row.message}"
    if row.nfe is None:
        note = f"failed: {row.message}"
    return note if len(note) <= MESSAGE else note[: MESSAGE - 3] + "..."
