"""Benchmarks of samplers: error against evaluations of the score, from common start noise.

A :class:`Target` says what right samples are and measures how far others are from it, always
beside the noise floor of the same measure; :func:`compare` runs solvers at step counts against it.
"""

from .engine import Row, compare
from .target import Target, mixture

__all__ = ["Row", "Target", "compare", "mixture"]
