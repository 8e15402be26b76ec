"""Benchmarks of samplers: error against evaluations of the score, from common start noise.

A :class:`Target` says what right samples are and measures how far others are from it, always
beside the noise floor of the same measure; :func:`compare` runs solvers on grids at step counts or
budgets of evaluations against it. The laws are targets known in closed form.
"""

from .engine import against_best, compare
from .laws import Law, Narrow, Overlapping, Separated, mixture
from .row import Row
from .target import Target

__all__ = [
    "Law",
    "Narrow",
    "Overlapping",
    "Row",
    "Separated",
    "Target",
    "against_best",
    "compare",
    "mixture",
]
