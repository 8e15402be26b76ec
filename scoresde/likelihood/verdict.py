r"""What a self-check has found: its figures, a verdict on them, and a table.

The range beside a measured coverage is that of a binomial share: of ``k`` hits in ``n``

    low = B^-1(a/2; k, n - k + 1),    high = B^-1(1 - a/2; k + 1, n - k)

with the quantiles ``B^-1`` of the beta distribution. A coverage is called wrong only where all of
its range lies below the level by more than :data:`SLACK`.

Source: The use of confidence or fiducial limits illustrated in the case of the binomial (Clopper
and Pearson, 1934), https://doi.org/10.1093/biomet/26.4.404.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SLACK = 0.02
"""Coverage that may be missing: 95 % is taken for 93 %."""
LARGE = 1.15
"""Root mean square error in units of the stated one, above which it is larger than stated."""
OUTLIERS = 1.5
"""The same, above which some errors are far larger than stated."""
NEGLIGIBLE = 1e-3
"""Nats below which what is left, rounding included, is of no interest whatever is stated."""
STEPS = "give solver_error or more steps"


@dataclass(frozen=True)
class Check:
    """How one mixture fared, in nats, and how that was obtained.

    Attributes:
        case: the mixture, ``"broad"`` or ``"narrow"``.
        ok: whether the interval covers as often as it says.
        verdict: what is wrong, and what helps; or what to know although it covers.
        bias: mean error of the estimator, without the prior's; ``bias_stderr`` its standard error.
        rms: root mean square of that error.
        stated: root mean square of the ``stderr`` that the estimates say; nan if they say none.
        coverage: share of the repeats whose interval holds the truth; ``coverage_range`` its
            binomial range at 95 %.
        coverage_with_prior: the same with what the prior lacks counted as error.
        prior_bias: mean of ``log prior(z) - log p(z; t_max)``: what the prior adds to the bias;
            ``prior_rms`` the root mean square of it.
        finer: what twice the steps (or a tenth of the tolerance) add to the estimates on average,
            and its standard error; None where it was not needed for the verdict.
        truth_stderr: root mean square error of the truth itself, 0 for a density.
        failed: repeats whose solve did not end.
        nfe: mean evaluations of an item.
        repeats: items, each with noise of its own; ``seed`` of items and noise.
        level: of the interval.
        levels: of the discrete data, None for a density.
        shape: of an item.
        sde: the process, with its parameters.
        how: method, steps, divergence and so on, as the result says them.
        seconds: wall-clock time.
    """

    case: str
    ok: bool
    verdict: str
    bias: float
    bias_stderr: float
    rms: float
    stated: float
    coverage: float
    coverage_range: tuple[float, float]
    coverage_with_prior: float
    prior_bias: float
    prior_rms: float
    finer: tuple[float, float] | None
    truth_stderr: float
    failed: int
    nfe: float
    repeats: int
    seed: int
    level: float
    levels: int | None
    shape: tuple[int, ...]
    sde: str
    how: dict[str, Any]
    seconds: float

    def bits(self, nats: float) -> float:
        """Nats an item in bits/dim, of which more are worse: of the other sign."""
        return -nats / (math.prod(self.shape) * math.log(2))


def report(checks: Sequence[Check]) -> str:
    """The checks as a table for a terminal, with their verdicts and how they were obtained."""
    first = checks[0]
    unit = "nats" if first.levels is None else "bits/dim"

    def size(check: Check, nats: float) -> str:
        return f"{nats if check.levels is None else abs(check.bits(nats)):.2g}"

    def signed(check: Check, nats: float) -> str:
        return f"{nats if check.levels is None else check.bits(nats):+.2g}"

    covers = f"covers, of {100 * first.level:g} %"
    rows = [["mixture", "bias", "rms error", "stated", covers, "with prior", "prior", "NFE"]]
    for c in checks:
        low, high = c.coverage_range
        rows.append([
            c.case, f"{signed(c, c.bias)} ± {size(c, c.bias_stderr)}", size(c, c.rms),
            size(c, c.stated), f"{100 * c.coverage:.1f} ({100 * low:.1f} to {100 * high:.1f})",
            f"{100 * c.coverage_with_prior:.1f}", signed(c, c.prior_bias), f"{c.nfe:.0f}",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    verdicts = [f"{c.case}: {'' if c.ok else 'NOT RIGHT: '}{c.verdict}" for c in checks]
    how = ", ".join(f"{key} {value}" for key, value in first.how.items())
    shape = "x".join(map(str, first.shape))
    kind = "densities" if first.levels is None else f"{first.levels} levels"
    return "\n".join([
        *lines, "", *verdicts, "",
        f"{unit}; {first.repeats} items of {shape} ({kind}) a mixture, seed {first.seed}, "
        f"{first.sde}", f"{how}; {sum(c.seconds for c in checks):.1f} s",
    ])  # fmt: skip


def verdict(check: Check, message: str, solver_error: bool) -> tuple[bool, str]:
    """Whether the interval covers as it says, and what is wrong or worth knowing.

    Args:
        check: with all but its verdict.
        message: why items did not end.
        solver_error: whether the settings ask for the solver's error.
    """
    if check.failed:
        return False, f"{check.failed} of {check.repeats} items did not end: {message}"
    if math.isnan(check.stated):
        what = "probe" if check.levels is None else "draw"
        return False, f"one {what} tells nothing of its error: give 2 {what}s or more"
    if check.rms < NEGLIGIBLE:
        return True, f"errs by {check.rms:.1g} nats, where intervals no longer matter"
    if check.stated == 0:
        return False, (
            f"the solver's error, {check.rms:.2g} nats, is not in the interval: give solver_error"
        )
    biased = abs(check.bias) > 3 * check.bias_stderr
    if check.coverage_range[1] < check.level - SLACK:
        share = f"{100 * check.coverage:.0f} of 100 intervals hold the truth: "
        if biased and abs(check.bias) > 0.5 * check.stated:
            return False, share + _bias(check, solver_error)
        ratio = check.rms / check.stated
        if ratio > LARGE:
            return False, (
                f"{share}the errors are {ratio:.2g} times as large as stated: "
                "give more probes or draws, or an exact divergence"
            )
        return False, (
            f"{share}the errors are of the size stated, but skewed: give more probes or draws, or "
            "a solver with steps along a grid, which turns its probes on the way"
        )
    notes = ["covers as it says"]
    if check.coverage_range[0] > check.level + SLACK:
        notes = ["covers more than it says"]
    if biased and abs(check.bias) > 0.05 * check.stated:
        items = math.ceil((check.stated / check.bias) ** 2)
        notes.append(
            f"in a mean over more than about {items} items its bias shows: "
            f"{_bias(check, solver_error=True)}"
        )
    if check.rms > OUTLIERS * check.stated:
        ratio, helps = check.rms / check.stated, "give more steps" if solver_error else STEPS
        notes.append(f"but a few items err by more, {ratio:.2g} times the stated in all: {helps}")
    if check.coverage - check.coverage_with_prior > SLACK:
        notes.append(
            f"but the prior, {check.prior_rms:.2g} nats off, is not in the interval: "
            "give a terminal"
        )
    return True, "; ".join(notes)


def _bias(check: Check, solver_error: bool) -> str:
    """Where a bias comes from, by what shorter steps would add."""
    bias = f"{check.bias:+.2g} nats"
    if check.finer is not None:
        change, error = check.finer
        if -change * math.copysign(1, check.bias) + 3 * error < abs(check.bias) / 2:
            return (
                f"{bias}, and not by the steps (shorter ones add {change:+.2g} ± {error:.1g}): "
                "the score is not that of the density"
            )
    if solver_error:
        return f"the solver errs by {bias}: give more steps"
    return f"the solver's error, {bias}, is not in the interval: {STEPS}"


def binomial_range(hits: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's range of a probability, of which ``hits`` of ``count`` were seen."""
    from scipy.special import betaincinv

    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else float(betaincinv(hits, count - hits + 1, tail))
    high = 1.0 if hits == count else float(betaincinv(hits + 1, count - hits, 1 - tail))
    return low, high
