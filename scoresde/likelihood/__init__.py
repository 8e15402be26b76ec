"""Likelihoods: exact by the probability-flow ODE, or bounded by the discrete chain."""

from .bits import bits_per_dim
from .bound import VLB, vlb
from .flow import LogProb, log_prob

__all__ = ["VLB", "LogProb", "bits_per_dim", "log_prob", "vlb"]
