r"""What a target for the mean of a data set costs: draws, steps, and items to check them on.

Half of the squared target is left to draws and probes, half to the steps. With the spot check's
``noise``, ``spread`` and ``shift`` of ``N`` items

    draws = ceil(noise^2 / (N target^2/2)),    items = ceil(spread^2 / (target^2/2 - rest^2))

and the steps are doubled while ``rest``, what even the refined solve still lacks, takes more than
half of its half.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from .budget import MOST_PROBES as MOST
from .evaluation import Evaluation
from .spot import SpotCheck, spot_check

DOUBLINGS = 5
"""Times that the steps are doubled at most."""


def plan(
    evaluation: Evaluation,
    target: float,
    items: int,
    progress: Callable[[int], object] | None = None,
) -> tuple[Evaluation, SpotCheck]:
    """The evaluation that reaches the target at least cost, and the check that says so.

    Args:
        evaluation: with the settings to start from.
        target: standard error of the mean of these items, in nats, > 0.
        items: of the first spot check.
        progress: called with the number of items checked.

    Raises:
        ValueError: for a target that is none.
    """
    if not 0 < target < math.inf:
        raise ValueError(f"the target is above 0, got {target}")
    half = target**2 / 2
    for doubling in range(DOUBLINGS + 1):
        if doubling:
            evaluation = _finer(evaluation)
        found = spot_check(evaluation, items, progress)
        rest = (found.shift / found.rest) ** 2
        if rest <= half / 2:
            break
    needed = math.ceil(found.spread**2 / max(half - rest, half / 4))
    wanted = math.ceil(found.noise**2 / (len(evaluation.data) * half))
    draws = max(1, min(wanted, MOST // evaluation.settings.get(_counted(evaluation), 1)))
    if draws > 1:
        evaluation = _more_draws(evaluation, draws)
        found = replace(found, noise=found.noise / math.sqrt(draws))
    if needed > found.items:
        found = spot_check(evaluation, needed, progress)
    return evaluation, found


def _finer(evaluation: Evaluation) -> Evaluation:
    """Twice the steps, or a tenth of the tolerance."""
    settings = dict(evaluation.settings)
    if settings.get("steps") is not None:
        settings["steps"] *= 2
    else:
        settings |= {name: settings.get(name, 1e-5) / 10 for name in ("rtol", "atol")}
    return replace(evaluation, settings=settings)


def _more_draws(evaluation: Evaluation, factor: int) -> Evaluation:
    """So many times the draws of discrete data, or the probes of continuous."""
    name = _counted(evaluation)
    more = evaluation.settings.get(name, 1) * factor
    return replace(evaluation, settings={**evaluation.settings, name: more})


def _counted(evaluation: Evaluation) -> str:
    """What more noise is averaged by."""
    return "probes" if evaluation.data.levels is None else "draws"
