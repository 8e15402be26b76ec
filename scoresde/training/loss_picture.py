"""``loss.png``: training and held-out loss over the steps, and the loss at each noise level.

Rows of a log are means over few steps and scatter widely: a line through means of groups of them
shows the course. Long runs have a logarithmic axis of steps, and groups that widen along it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..pictures import ACCENT, INK, SOFT

LONG = 10_000
"""Steps from which a run is shown over a logarithmic axis."""
GROUPS = 100
Rows = Sequence[Mapping[str, Any]]


def draw(
    file: Path,
    train: Rows,
    heldout: Rows,
    edges: Sequence[float] | None = None,
    unit: str = "loss a dimension",
) -> None:
    """Draws the picture; the second panel is left out where no row has ``loss_by_time``.

    Args:
        file: a PNG.
        train: rows of ``logs/train.jsonl``.
        heldout: rows of ``logs/heldout.jsonl``.
        edges: log-SNR between the bins of ``loss_by_time`` and at both ends, from high to low.
        unit: what the loss is.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    levels = [(r["step"], r["loss_by_time"]) for r in train if r.get("loss_by_time")]
    figure = Figure(figsize=(11 if levels else 7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if levels else 1, squeeze=False)[0]
    last = max((r["step"] for r in [*train, *heldout]), default=0)
    _losses(panels[0], curve(train), curve(heldout), last >= LONG)
    panels[0].set_ylabel(unit)
    if levels:
        steps = np.array([step for step, _ in levels], dtype=float)
        values = np.array([list(row) for _, row in levels], dtype=float)  # None becomes nan
        _levels(panels[1], steps, values, edges, last >= LONG)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("step")
        if last >= LONG:
            axes.set_xscale("log")
    figure.savefig(file, dpi=110)


def curve(rows: Rows, key: str = "loss") -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of a column of a log."""
    found = [(r["step"], r[key]) for r in rows if r.get(key) is not None and "step" in r]
    steps, values = np.array(found, dtype=float).reshape(-1, 2).T
    fine = np.isfinite(values)
    return steps[fine], values[fine]


def grouped(
    steps: np.ndarray, values: np.ndarray, groups: int, log: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Means of consecutive rows, in groups of equal width in the step or its logarithm.

    Args:
        steps: ``(N,)``, rising, positive where ``log``.
        values: ``(N,)`` or ``(N, K)``; nan counts as missing.
        groups: at most so many means.
        log: whether the groups are of equal width in ``log(step)``.

    Returns:
        ``(M,)`` mean steps and ``(M,)`` or ``(M, K)`` means, nan where a group has no value.
    """
    if not len(steps):
        return steps, values
    place = np.log(np.maximum(steps, 1)) if log else steps
    width = max(float(place[-1] - place[0]), 1e-12)
    index = np.minimum((place - place[0]) / width * groups, groups - 1).astype(int)
    there, group = np.unique(index, return_inverse=True)
    table = values.reshape(len(values), -1)
    known = np.isfinite(table)
    total, count = (np.zeros((len(there), table.shape[1])) for _ in range(2))
    np.add.at(total, group, np.where(known, table, 0.0))
    np.add.at(count, group, known)
    with np.errstate(invalid="ignore"):
        means = total / np.where(count > 0, count, np.nan)
    middle = np.bincount(group, steps) / np.bincount(group)
    return middle, means.reshape(len(there), *values.shape[1:])


def _losses(
    axes: Any,
    train: tuple[np.ndarray, np.ndarray],
    heldout: tuple[np.ndarray, np.ndarray],
    log: bool,
) -> None:
    many = len(train[0]) > GROUPS / 2
    if many:
        axes.plot(*grouped(*train, 2000, log), color=SOFT, linewidth=0.6, alpha=0.6)
        axes.plot(*grouped(*train, GROUPS // 2, log), color=INK, label="training", linewidth=1.6)
    elif len(train[0]):
        axes.plot(*train, color=INK, linewidth=1.6, marker="o", markersize=3, label="training")
    if len(heldout[0]):
        axes.plot(
            *heldout, color=ACCENT, linewidth=1.6, marker="o", markersize=4,
            label="held out, averaged weights",
        )  # fmt: skip
    if any((values > 0).any() for _, values in (train, heldout)):
        axes.set_yscale("log")
    if axes.get_lines():
        axes.legend(frameon=False)


def _levels(
    axes: Any, steps: np.ndarray, values: np.ndarray, edges: Sequence[float] | None, log: bool
) -> None:
    from matplotlib import colormaps

    steps, values = grouped(steps, values, GROUPS // 2, log)
    count = values.shape[1]
    for k in range(count):
        known = np.isfinite(values[:, k])
        name = f"bin {k + 1}" if edges is None else f"{edges[k]:.1f} to {edges[k + 1]:.1f}"
        colour = colormaps["viridis"](0.95 * k / max(count - 1, 1))
        style = {"marker": "o", "markersize": 3} if known.sum() < 10 else {}
        axes.plot(steps[known], values[known, k], color=colour, linewidth=1.4, label=name, **style)
    if (values > 0).any():
        axes.set_yscale("log")
    axes.set_ylabel("training loss by noise level")
    axes.legend(
        frameon=False, fontsize=7, title="log-SNR", title_fontsize=8,
        loc="center left", bbox_to_anchor=(1.0, 0.5),
    )  # fmt: skip
