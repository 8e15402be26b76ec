r"""The spot check: what a few items tell of the error of all.

For a set of ``N`` items the mean of ``log p`` has three errors. Two come from a **spot check** of
a few items with noise of their own: what draws and probes leave, by a second evaluation; what the
steps leave, by a refined one, whose mean difference is also taken out of the mean. The third, what
another set of as many items would change, is the spread of the items:

    mean = (1/N) sum_i L_i + d,           d = mean of (L_refined - L) over m checked items
    draws^2 = var(L - L') / (2 N),        steps^2 = var(d_i)/m + (d / REST)^2

Steps too long add nearly the same to every item, so that few tell what all need: most of the set
is solved with a fraction of the evaluations of a converged solve.

Source: Multilevel Monte Carlo Path Simulation (Giles, 2008), https://doi.org/10.1287/opre.1070.0496.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..series import BLOCK
from .evaluation import Evaluation
from .solve import Way

REFINE = 4
"""Factor on the steps of the spot check (a hundredth of the tolerance of an adaptive method)."""
REST = 15.0
"""At least so much larger than what a refined solve still lacks is its difference, for a method
of order two; of order one it is three times as large."""
SPOT = 1 << 48
"""Index of the first sample of a spot check, whose noise is not that of any item."""


@dataclass(frozen=True)
class SpotCheck:
    """What a few items tell of the error of all; per item, in nats.

    ``shift`` is what refined steps change on average and ``spread`` its standard deviation between
    items; ``noise`` the standard deviation that draws and probes give one evaluation.
    """

    items: int
    shift: float
    spread: float
    noise: float
    nfe: int
    rest: float = REST

    def steps_stderr(self) -> float:
        """Standard error of a mean from which the shift is taken out, nats; nan if not known."""
        return math.hypot(self.spread / math.sqrt(self.items), self.shift / self.rest)


def spot_check(
    evaluation: Evaluation, items: int, progress: Callable[[int], object] | None = None
) -> SpotCheck:
    """Evaluates ``items`` items, evenly spread, again and with refined steps.

    Raises:
        ValueError: for fewer than two items, which tell no spread.
    """
    total = len(evaluation.data)
    items = min(items, total)
    if items < 2:
        raise ValueError(f"a spot check needs at least 2 items, got {items}")
    index = torch.linspace(0, total - 1, items).round().long()
    found: list[Tensor] = []
    nfe = 0
    for part in range(0, items, BLOCK):
        here, noise = index[part : part + BLOCK], SPOT + part
        outs = (
            evaluation.of(here, noise),
            evaluation.of(here, noise + SPOT // 2),
            evaluation.of(here, noise, refine=REFINE),
        )
        for out in outs:
            if not bool(out.converged.all()):
                raise ValueError(
                    f"the spot check did not end: {out.message}; --spot 0 leaves it out"
                )
        found.append(torch.stack([out.log_prob.cpu().double() for out in outs]))
        nfe += sum(int(out.nfe.sum()) for out in outs)
        if progress is not None:
            progress(len(here))
    values, again, refined = torch.cat(found, 1)
    steps = refined - values
    return SpotCheck(
        items=items,
        shift=float(steps.mean()),
        # Not a digit of difference: the state resolves no finer tolerance.
        spread=float(steps.std()) if bool(steps.any()) else math.nan,
        noise=float(((values - again) ** 2 / 2).mean().sqrt()),
        nfe=nfe,
        rest=_rest(evaluation.settings),
    )


def _rest(settings: dict[str, Any]) -> float:
    """The difference of a refined solve in units of what it still lacks, by the method's order."""
    method, steps = settings.get("method", "dopri5"), settings.get("steps")
    chosen = Way(method, steps, settings.get("grid"), 1.0, 1.0, 10**9).chosen()
    first = method == "euler" if chosen is None else chosen[0].order < 2
    return REFINE - 1 if first else REST
