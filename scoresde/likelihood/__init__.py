"""Likelihoods with error bars: by the probability-flow ODE, bounded, and of discrete data."""

from .bits import bits_per_dim
from .bound import VLB, vlb
from .classifier import Posterior, classify
from .continuous import ELBO, elbo
from .denoising import DenoisingLogProb, denoising_log_prob
from .discrete import data_log_prob
from .flow import log_prob
from .result import LogProb
from .variational import Variational, fit_dequantizer

__all__ = [
    "ELBO",
    "VLB",
    "DenoisingLogProb",
    "LogProb",
    "Posterior",
    "Variational",
    "bits_per_dim",
    "classify",
    "data_log_prob",
    "denoising_log_prob",
    "elbo",
    "fit_dequantizer",
    "log_prob",
    "vlb",
]
