r"""Variance-exploding process: noise added, nothing taken away.

    dx = sigma(t) sqrt(2 log(sigma_max / sigma_min)) dw,
    alpha = 1,    sigma(t) = sigma_min (sigma_max / sigma_min)^t

As in the published models, the kernel's variance is ``sigma(t)^2``, so that the data themselves
count as carrying noise of ``sigma_min`` at ``t = 0``.

Source: Score-Based Generative Modeling through Stochastic Differential Equations (Song et al.,
2021), https://arxiv.org/abs/2011.13456.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .base import GaussianSDE, as_time


@dataclass(frozen=True)
class VE(GaussianSDE):
    """Variance-exploding process with a geometric ``sigma(t)``.

    Args:
        sigma_min: noise at ``t = 0``, > 0.
        sigma_max: noise at ``t = 1``; about the largest distance between two data points.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min_sampling: float = field(default=1e-5, kw_only=True)

    default_solver: ClassVar[str] = "pc"
    default_parameterization: ClassVar[str] = "karras"
    langevin_snr: ClassVar[float] = 0.16
    ode_min_steps: ClassVar[int] = 100
    # With the grid of Karras et al. (2022, table 1) Song et al.'s networks need 27 evaluations.
    ode_min_nfe: ClassVar[int] = 27

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"VE needs 0 < sigma_min < sigma_max, "
                f"got sigma_min={self.sigma_min}, sigma_max={self.sigma_max}"
            )

    @property
    def log_ratio(self) -> float:
        """``log(sigma_max / sigma_min)``."""
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: float | Tensor) -> Tensor:
        """1."""
        return torch.ones_like(as_time(t))

    def sigma(self, t: float | Tensor) -> Tensor:
        """``sigma_min (sigma_max / sigma_min)^t``."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** as_time(t)

    def drift_rate(self, t: float | Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(as_time(t))

    def diffusion(self, t: float | Tensor) -> Tensor:
        """``sigma(t) sqrt(2 log(sigma_max / sigma_min))``."""
        return self.sigma(t) * math.sqrt(2 * self.log_ratio)

    def time(self, log_snr: float | Tensor) -> Tensor:
        """Inverse of ``log_snr = -log sigma``, linear in ``t``."""
        return (-as_time(log_snr) - math.log(self.sigma_min)) / self.log_ratio
