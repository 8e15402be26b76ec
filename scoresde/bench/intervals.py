r"""Intervals at 95 % for what repeats and samples give.

Over ``R`` repeats with seeds of their own, the mean and Student's interval:

    mean +- t_(R-1) std / sqrt(R)

cut at zero for errors, which are not negative.
Within one run, samples are independent. The root mean square over them is the root of a mean, and
its interval the root of that of the mean (zero where that is negative):

    sqrt(m +- t_(n-1) std(e^2) / sqrt(n)),    m = mean(e^2)

The quantile ``p`` lies between the samples of ranks ``n p +- z sqrt(n p (1 - p))``: how many of
``n`` lie below it is binomial, here taken as normal.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from torch import Tensor

LEVEL = 0.95


def student(values: Sequence[float]) -> tuple[float, float] | None:
    """The interval of the mean of independent values; None for a single one or not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    half = quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def root_of_mean(squares: Tensor) -> tuple[float, float] | None:
    """The interval of the root of the mean of ``squares (N,)``, one a sample."""
    if len(squares) < 2 or not bool(squares.isfinite().all()):
        return None
    half = quantile(len(squares) - 1) * float(squares.std()) / math.sqrt(len(squares))
    mean = float(squares.mean())
    return math.sqrt(max(mean - half, 0.0)), math.sqrt(mean + half)


def order_statistics(values: Tensor, p: float) -> tuple[float, float] | None:
    """The interval of the quantile ``p`` of sorted ``values (N,)``; None if too few."""
    n = len(values)
    half = quantile(n - 1) * math.sqrt(n * p * (1 - p)) if n > 1 else math.inf
    low, high = n * p - half, n * p + half
    if low < 0 or high > n - 1:
        return None
    return float(values[math.floor(low)]), float(values[math.ceil(high)])


def paired_ratio(
    errors: Sequence[float], best: Sequence[float]
) -> tuple[float, tuple[float, float] | None]:
    """The ratio of two errors from common noise, and its interval over the repeats.

    The mean of the ratios' logarithms, so that the interval is of their geometric mean.

    Args:
        errors: one a repeat, > 0.
        best: of the same repeats, > 0.
    """
    logs = [math.log(a / b) for a, b in zip(errors, best, strict=True)]
    interval = student(logs)
    ratio = math.exp(statistics.fmean(logs))
    return ratio, None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))


def spread(value: float, interval: tuple[float, float]) -> float:
    """The half width in ``value +- half`` that covers an interval, be it uneven or cut at zero."""
    return max(interval[1] - value, value - interval[0])


def quantile(freedom: int) -> float:
    """Student's t beyond which 2.5 % lie on either side."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    return float(stdtrit(freedom, (1 + LEVEL) / 2))
