"""Time grids tuned to a model: the search for their points, and the files that keep them."""

from .files import FILE, recall
from .tuner import Tuning, tune

__all__ = ["FILE", "Tuning", "recall", "tune"]
