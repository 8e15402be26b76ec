r"""Variance-preserving process with a cosine schedule.

    alpha(t) = cos(theta) / cos(theta_0),   theta = (t + s)/(1 + s) pi/2,   sigma^2 = 1 - alpha^2

``alpha`` vanishes at ``t = 1``, where the score no longer determines the data, so the process is
used up to ``t_max = 0.9946`` (``alpha = 0.0085``).

Sources: Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021),
https://arxiv.org/abs/2102.09672; the end time is that of DPM-Solver (Lu et al., 2022),
https://arxiv.org/abs/2206.00927.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import GaussianSDE, as_time


@dataclass(frozen=True)
class Cosine(GaussianSDE):
    """Cosine schedule.

    Args:
        s: offset that keeps the noise of the first steps from vanishing, > 0.
    """

    s: float = 0.008
    t_max: float = field(default=0.9946, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.s > 0:
            raise ValueError(f"Cosine needs s > 0, got s={self.s}")
        if not self.t_max < 1:
            raise ValueError(f"Cosine needs t_max < 1, where alpha vanishes, got {self.t_max}")

    @property
    def prior_std(self) -> float:
        """1: the prior is the standard normal."""
        return 1.0

    @property
    def _theta_0(self) -> float:
        return self.s / (1 + self.s) * math.pi / 2

    def _theta(self, t: float | Tensor) -> Tensor:
        return (as_time(t) + self.s) / (1 + self.s) * (math.pi / 2)

    def alpha(self, t: float | Tensor) -> Tensor:
        """``cos(theta) / cos(theta_0)``."""
        return torch.cos(self._theta(t)) / math.cos(self._theta_0)

    def sigma(self, t: float | Tensor) -> Tensor:
        """``sqrt(sin(theta - theta_0) sin(theta + theta_0)) / cos(theta_0)``, no cancellation."""
        step = as_time(t) / (1 + self.s) * (math.pi / 2)
        product = torch.sin(step) * torch.sin(step + 2 * self._theta_0)
        return product.sqrt() / math.cos(self._theta_0)

    def drift_rate(self, t: float | Tensor) -> Tensor:
        """``-tan(theta) d theta/dt``."""
        return -torch.tan(self._theta(t)) * (math.pi / 2 / (1 + self.s))

    def diffusion(self, t: float | Tensor) -> Tensor:
        """``sqrt(-2 d log alpha/dt)``, as for every variance-preserving process."""
        return (-2 * self.drift_rate(t)).sqrt()

    def time(self, log_snr: float | Tensor) -> Tensor:
        """Inverse of ``log_snr``, from ``alpha^2 = sigmoid(2 log_snr)``."""
        log_snr = as_time(log_snr)
        cos2 = torch.sigmoid(2 * log_snr) * math.cos(self._theta_0) ** 2
        sin2 = (
            torch.sigmoid(-2 * log_snr) * math.cos(self._theta_0) ** 2
            + math.sin(self._theta_0) ** 2
        )
        theta = torch.atan2(sin2.sqrt(), cos2.sqrt())
        return (theta - self._theta_0) * (1 + self.s) / (math.pi / 2)
