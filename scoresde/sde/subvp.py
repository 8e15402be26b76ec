r"""Sub-variance-preserving process: the mean of VP with less noise.

    dx = -beta(t)/2 x dt + sqrt(beta(t) (1 - alpha^4)) dw,    sigma = 1 - alpha^2

Source: Score-Based Generative Modeling through Stochastic Differential Equations (Song et al.,
2021), https://arxiv.org/abs/2011.13456.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import as_time
from .vp import LinearBeta


@dataclass(frozen=True)
class SubVP(LinearBeta):
    """Sub-VP process, ``sigma = 1 - alpha^2`` (the standard deviation, not its square)."""

    name: ClassVar[str] = "subvp"

    def sigma(self, t: float | Tensor) -> Tensor:
        """``1 - alpha^2``, as ``-expm1(2 log alpha)``."""
        return -torch.expm1(2 * self.log_alpha(t))

    def diffusion(self, t: float | Tensor) -> Tensor:
        """``sqrt(beta(t) (1 - alpha^4))``."""
        return (self.beta(t) * -torch.expm1(4 * self.log_alpha(t))).sqrt()

    def time(self, log_snr: float | Tensor) -> Tensor:
        """Inverse of ``log_snr``: ``1/alpha - alpha = e^-log_snr`` gives ``log alpha``."""
        return self._time_of_log_alpha(-torch.asinh(torch.exp(-as_time(log_snr)) / 2))
