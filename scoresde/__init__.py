"""scoresde: continuous-time score-based generative models.

One arrow: ``SDE -> Score -> Reverse -> Solver -> samples, latents, likelihoods``. The public names
load on first use, so that importing the package (and ``scoresde --help``) does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "sde": [
        "DDPM",
        "EDM",
        "SDE",
        "VE",
        "VP",
        "Cosine",
        "GaussianSDE",
        "Linear",
        "Reverse",
        "SubVP",
    ],
    "parameterization": ["V", "X0", "Eps", "Karras", "RawScore", "ScaledScore"],
    "model": ["Score", "ScoreModel"],
    "classifier": ["NoisyClassifier"],
    "analytic": ["GaussianMixture", "MixtureScore"],
    "correlated": ["CorrelatedMixture"],
    "labelled": ["LabelledMixture"],
    "training.objective": ["DSM"],
    "sampling": ["Samples", "sample"],
    "tuning": ["Tuning", "tune"],
    "thresholding": ["Threshold"],
    "latents": ["Interpolation", "Latents", "decode", "encode", "interpolate"],
    "sphere": ["slerp"],
    "editing": ["Bridge", "bridge", "edit"],
    "likelihood": [
        "LogProb",
        "Posterior",
        "bits_per_dim",
        "classify",
        "data_log_prob",
        "denoising_log_prob",
        "elbo",
        "log_prob",
        "vlb",
    ],
    "checkpoint": ["load", "load_classifier"],
    "config": ["ConfigError"],
}
_HOME_OF = {name: home for home, members in _HOMES.items() for name in members}
_ROOMS = [
    "bench",
    "config",
    "data",
    "given",
    "grids",
    "guidance",
    "inverse",
    "likelihood",
    "metrics",
    "nets",
    "noise_labels",
    "sde",
    "solvers",
    "training",
]

__all__ = [
    "DDPM",
    "DSM",
    "EDM",
    "SDE",
    "VE",
    "VP",
    "X0",
    "Bridge",
    "ConfigError",
    "CorrelatedMixture",
    "Cosine",
    "Eps",
    "GaussianMixture",
    "GaussianSDE",
    "Interpolation",
    "Karras",
    "LabelledMixture",
    "Latents",
    "Linear",
    "LogProb",
    "MixtureScore",
    "NoisyClassifier",
    "Posterior",
    "RawScore",
    "Reverse",
    "Samples",
    "ScaledScore",
    "Score",
    "ScoreModel",
    "SubVP",
    "Threshold",
    "Tuning",
    "V",
    "__version__",
    "bench",
    "bits_per_dim",
    "bridge",
    "classify",
    "config",
    "data",
    "data_log_prob",
    "decode",
    "denoising_log_prob",
    "edit",
    "elbo",
    "encode",
    "given",
    "grids",
    "guidance",
    "interpolate",
    "inverse",
    "likelihood",
    "load",
    "load_classifier",
    "log_prob",
    "metrics",
    "nets",
    "noise_labels",
    "sample",
    "sde",
    "slerp",
    "solvers",
    "training",
    "tune",
    "vlb",
]

if TYPE_CHECKING:
    from . import (
        bench,
        config,
        data,
        given,
        grids,
        guidance,
        inverse,
        likelihood,
        metrics,
        nets,
        noise_labels,
        sde,
        solvers,
        training,
    )
    from .analytic import GaussianMixture, MixtureScore
    from .checkpoint import load, load_classifier
    from .classifier import NoisyClassifier
    from .config import ConfigError
    from .correlated import CorrelatedMixture
    from .editing import Bridge, bridge, edit
    from .labelled import LabelledMixture
    from .latents import Interpolation, Latents, decode, encode, interpolate
    from .likelihood import (
        LogProb,
        Posterior,
        bits_per_dim,
        classify,
        data_log_prob,
        denoising_log_prob,
        elbo,
        log_prob,
        vlb,
    )
    from .model import Score, ScoreModel
    from .parameterization import X0, Eps, Karras, RawScore, ScaledScore, V
    from .sampling import Samples, sample
    from .sde import DDPM, EDM, SDE, VE, VP, Cosine, GaussianSDE, Linear, Reverse, SubVP
    from .sphere import slerp
    from .thresholding import Threshold
    from .training.objective import DSM
    from .tuning import Tuning, tune


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__])
