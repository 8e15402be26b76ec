r"""The EDM process: time is the noise level itself.

    dx = sqrt(2 t) dw,    alpha = 1,    sigma(t) = t,    t in [sigma_min, sigma_max]

Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
https://arxiv.org/abs/2206.00364.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .base import GaussianSDE, as_time


@dataclass(frozen=True)
class EDM(GaussianSDE):
    """EDM process; its four times follow from the two noise levels.

    Args:
        sigma_min: smallest noise level, the end of sampling, > 0.
        sigma_max: largest noise level, the standard deviation of the prior.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    t_min: float = field(init=False, default=0.0)
    t_max: float = field(init=False, default=0.0)
    t_min_sampling: float = field(init=False, default=0.0)
    t_min_likelihood: float = field(init=False, default=0.0)

    default_parameterization: ClassVar[str] = "karras"
    default_objective: ClassVar[dict[str, str]] = {"weight": "edm", "times": "log-normal"}

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"EDM needs 0 < sigma_min < sigma_max, "
                f"got sigma_min={self.sigma_min}, sigma_max={self.sigma_max}"
            )
        for name in ("t_min", "t_min_sampling", "t_min_likelihood"):
            object.__setattr__(self, name, self.sigma_min)
        object.__setattr__(self, "t_max", self.sigma_max)

    def alpha(self, t: float | Tensor) -> Tensor:
        """1."""
        return torch.ones_like(as_time(t))

    def sigma(self, t: float | Tensor) -> Tensor:
        """``t``."""
        return as_time(t).clone()

    def drift_rate(self, t: float | Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(as_time(t))

    def diffusion(self, t: float | Tensor) -> Tensor:
        """``sqrt(2 t)``."""
        return (2 * as_time(t)).sqrt()

    def time(self, log_snr: float | Tensor) -> Tensor:
        """Inverse of ``log_snr = -log t``."""
        return (-as_time(log_snr)).exp()
