r"""The straight path between data and noise, on which flow matching is trained.

    alpha = 1 - t,    sigma = t,    dx = -x/(1 - t) dt + sqrt(2 t/(1 - t)) dw

The data vanish at ``t = 1``, where drift and diffusion diverge, so the process is used up to
``t_max = 0.999`` (log-SNR -6.9).

Source: Flow Matching for Generative Modeling (Lipman et al., 2023),
https://arxiv.org/abs/2210.02747.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .base import GaussianSDE, as_time


@dataclass(frozen=True)
class Linear(GaussianSDE):
    """Linear interpolation, ``x_t = (1 - t) x_0 + t eps``."""

    t_max: float = field(default=0.999, kw_only=True)

    default_objective: ClassVar[dict[str, str]] = {"weight": "velocity"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.t_max < 1:
            raise ValueError(f"Linear needs t_max < 1, where alpha vanishes, got {self.t_max}")

    @property
    def prior_std(self) -> float:
        """1: the prior is the standard normal."""
        return 1.0

    def alpha(self, t: float | Tensor) -> Tensor:
        """``1 - t``."""
        return 1 - as_time(t)

    def sigma(self, t: float | Tensor) -> Tensor:
        """``t``."""
        return as_time(t).clone()

    def log_alpha(self, t: float | Tensor) -> Tensor:
        """``log1p(-t)``."""
        return torch.log1p(-as_time(t))

    def drift_rate(self, t: float | Tensor) -> Tensor:
        """``-1/(1 - t)``."""
        return -1 / (1 - as_time(t))

    def diffusion(self, t: float | Tensor) -> Tensor:
        """``sqrt(2 t/(1 - t))``."""
        t = as_time(t)
        return (2 * t / (1 - t)).sqrt()

    def time(self, log_snr: float | Tensor) -> Tensor:
        """Inverse of ``log_snr = log((1 - t)/t)``: ``sigmoid(-log_snr)``."""
        return torch.sigmoid(-as_time(log_snr))
