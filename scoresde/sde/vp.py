r"""Variance-preserving process: DDPM in continuous time.

    dx = -beta(t)/2 x dt + sqrt(beta(t)) dw,    beta(t) = beta_min + t (beta_max - beta_min)
    log alpha = -t^2 (beta_max - beta_min)/4 - t beta_min/2,    sigma^2 = 1 - alpha^2

Sources: Denoising Diffusion Probabilistic Models (Ho et al., 2020),
https://arxiv.org/abs/2006.11239; Score-Based Generative Modeling through Stochastic Differential
Equations (Song et al., 2021), https://arxiv.org/abs/2011.13456.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .base import GaussianSDE, as_time


@dataclass(frozen=True)
class LinearBeta(GaussianSDE):
    """What processes with the linear rate ``beta(t)`` share: ``alpha`` and its inverse.

    Args:
        beta_min: rate at ``t = 0``, > 0.
        beta_max: rate at ``t = 1``, >= beta_min.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(
                f"{type(self).__name__} needs 0 < beta_min <= beta_max, "
                f"got beta_min={self.beta_min}, beta_max={self.beta_max}"
            )

    @property
    def prior_std(self) -> float:
        """1: the prior is the standard normal."""
        return 1.0

    def beta(self, t: float | Tensor) -> Tensor:
        """``beta(t) = beta_min + t (beta_max - beta_min)``."""
        return self.beta_min + as_time(t) * (self.beta_max - self.beta_min)

    def log_alpha(self, t: float | Tensor) -> Tensor:
        """``-t^2 (beta_max - beta_min)/4 - t beta_min/2``."""
        t = as_time(t)
        return -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def alpha(self, t: float | Tensor) -> Tensor:
        """``exp(log_alpha(t))``."""
        return self.log_alpha(t).exp()

    def drift_rate(self, t: float | Tensor) -> Tensor:
        """``-beta(t)/2``."""
        return -self.beta(t) / 2

    def _time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """Root of ``a t^2 + b t + log_alpha = 0``, in the form that cancels nothing."""
        a, b = (self.beta_max - self.beta_min) / 4, self.beta_min / 2
        return -2 * log_alpha / (b + (b**2 - 4 * a * log_alpha).sqrt())


@dataclass(frozen=True)
class VP(LinearBeta):
    """Variance-preserving process, ``alpha^2 + sigma^2 = 1``, ``g^2 = beta(t)``."""

    def sigma(self, t: float | Tensor) -> Tensor:
        """``sqrt(1 - alpha^2)``, as ``sqrt(-expm1(2 log alpha))``."""
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def diffusion(self, t: float | Tensor) -> Tensor:
        """``sqrt(beta(t))``."""
        return self.beta(t).sqrt()

    def time(self, log_snr: float | Tensor) -> Tensor:
        """Inverse of ``log_snr``: ``log alpha = -softplus(-2 log_snr)/2``, then a quadratic."""
        return self._time_of_log_alpha(-softplus(-2 * as_time(log_snr), threshold=50) / 2)
