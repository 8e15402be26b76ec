"""Metrics: distances between sets of items, each with the noise floor of its own sample size.

A distance of 0.02 says nothing by itself: two sets of real items have one too. Every metric here
therefore also gives the value that real items reach among themselves (``floor``).
"""

from .distances import MMD, Distance, SlicedWasserstein, wasserstein2
from .frechet import frechet

__all__ = ["MMD", "Distance", "SlicedWasserstein", "frechet", "wasserstein2"]
