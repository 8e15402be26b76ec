"""One line of a comparison, and what can stand in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from ..config import changed, class_name


@dataclass(frozen=True)
class Measure:
    """An error that a row can hold; less is better.

    Args:
        key: the field of :class:`Row`.
        name: heading of its column.
        title: what it is, in a line.
        meaning: how it is defined.
        in_units: whether it is in units of the data.
        of_path: whether it is the distance to the converged path from the same start, which the
            error of the reference bounds from below; otherwise it is one of laws.
        signed: whether right samples may give less than zero.
    """

    key: str
    name: str
    title: str
    meaning: str
    in_units: bool = False
    of_path: bool = False
    signed: bool = False


MEASURES = (
    Measure(
        "endpoint_rms", "endpoint RMS", "RMS distance to the converged ODE solution",
        "root mean square, over samples and entries, of the distance to the converged solution of "
        "the probability-flow ODE from the same start, in the model's range; solvers of the ODE",
        of_path=True,
    ),
    Measure(
        "endpoint_median", "endpoint median",
        "distance to the converged ODE solution, median over samples",
        "median over samples of that distance, a root mean square over entries", of_path=True,
    ),
    Measure(
        "endpoint_q95", "endpoint 95 %",
        "distance to the converged ODE solution, 95 % of samples below",
        "the quantile below which that distance lies for 95 % of the samples", of_path=True,
    ),
    Measure(
        "sliced_w2", "sliced W2", "sliced Wasserstein-2 distance",
        "sliced Wasserstein-2 distance of the samples to the reference items, over the random "
        "directions that the settings count", in_units=True,
    ),
    Measure(
        "mmd2", "MMD^2", "squared MMD (on the axis: below it, or negative)",
        "unbiased squared maximum mean discrepancy between the samples and the reference items, "
        "of rational-quadratic kernels; it may be negative", signed=True,
    ),
    Measure(
        "mean_error", "mean error", "RMS error of the mean",
        "root mean square over entries of the error of the samples' mean against the exact one",
        in_units=True,
    ),
    Measure(
        "covariance_error", "cov. error", "relative error of the covariance",
        "Frobenius norm of the error of the samples' covariance, over that of the exact one",
    ),
)  # fmt: skip
DISTANCES = ("sliced_w2", "mmd2")
"""The measures that have a say in whether a row reaches the floor."""


@dataclass(frozen=True)
class Row:
    """One solver on one grid at one step count.

    Every measure is a mean over the repeats.

    Args:
        solver: name, with the fields that are not at their defaults.
        steps: steps of the solver; None if it chose them.
        grid: name of the grid, as of the solver; None if the solver chose its steps.
        sde: name of the process, as of the solver.
        law: name of what the samples are compared to.
        budget: evaluations that were allowed, where a budget and no step count was given.
        nfe: evaluations of the score for a sample, the last denoising included; on average.
        nfe_max: the same of the sample that took most.
        seconds: wall-clock time of all samples, the median over the repeats.
        seconds_low: the shortest of them.
        seconds_high: the longest of them.
        endpoint_rms: root mean square distance to the converged solution of the ODE from the same
            start, over samples and entries, in the model's range; None for stochastic solvers or
            if not asked for.
        endpoint_median: median over samples of the root mean square distance over entries.
        endpoint_q95: the quantile of the same below which 95 % of the samples lie.
        reference_error: what is known of the error of that converged solution itself.
        sliced_w2: sliced Wasserstein-2 distance to the reference, in units of the data.
        sliced_w2_stderr: its standard error over directions.
        mmd2: unbiased squared MMD to the reference.
        mmd2_stderr: its standard error over items.
        mean_error: root mean square error of the mean over entries, where the truth is known.
        covariance_error: relative Frobenius error of the covariance, where the truth is known.
        vs_best: error of this row over that of the best row which takes no more evaluations; see
            :func:`scoresde.bench.against_best`.
        repeats: runs that the means are over.
        converged: whether the solver arrived with finite values, each time.
        message: what went wrong or deserves notice.
        intervals: of some fields, the 95 % interval ``(low, high)``.
        runs: of each measure, its value in every repeat.
    """

    solver: str
    steps: int | None = None
    grid: str | None = None
    sde: str = ""
    law: str = ""
    budget: int | None = None
    nfe: float | None = None
    nfe_max: int | None = None
    seconds: float | None = None
    seconds_low: float | None = None
    seconds_high: float | None = None
    endpoint_rms: float | None = None
    endpoint_median: float | None = None
    endpoint_q95: float | None = None
    reference_error: float | None = None
    sliced_w2: float | None = None
    sliced_w2_stderr: float | None = None
    mmd2: float | None = None
    mmd2_stderr: float | None = None
    mean_error: float | None = None
    covariance_error: float | None = None
    vs_best: float | None = None
    repeats: int = 0
    converged: bool = False
    message: str = ""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict, hash=False)
    runs: Mapping[str, tuple[float, ...]] = field(default_factory=dict, hash=False)

    def value(self, key: str) -> float | None:
        """A measure, None where it is missing or not finite."""
        found = getattr(self, key)
        return found if found is not None and math.isfinite(found) else None

    @property
    def case(self) -> tuple[str, str]:
        """The problem that the row solves; only rows of one problem can be compared."""
        return self.sde, self.law


def label(thing: Any) -> str:
    """A name with the fields that differ from their defaults: ``ddim(eta=1)``."""
    fields = [f"{k}={_plain(v)}" for k, v in changed(thing).items()]
    name = class_name(type(thing))
    return f"{name}({', '.join(fields)})" if fields else name


def _plain(value: Any) -> str:
    if is_dataclass(value) and not isinstance(value, type):
        return label(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
