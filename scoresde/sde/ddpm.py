r"""DDPM's discrete table as a continuous process that meets it at every point.

With the table ``beta_1..beta_N`` and ``t_i = i/N``:

    log alpha(t_i) = 1/2 sum_{j <= i} log(1 - beta_j),  linear in between,  sigma^2 = 1 - alpha^2

which is the VP process whose rate is the constant ``-N log(1 - beta_i)`` on each interval. On the
uniform grid of N steps its transitions are DDPM's, number by number; :class:`VP` is the limit for
many steps.

Source: Denoising Diffusion Probabilistic Models (Ho et al., 2020),
https://arxiv.org/abs/2006.11239.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from .base import GaussianSDE, as_time


@dataclass(frozen=True)
class DDPM(GaussianSDE):
    """VP process through the points of DDPM's linear table of ``beta``.

    Args:
        num_steps: ``N``, the length of the table.
        beta_start: ``beta_1``, in (0, 1).
        beta_end: ``beta_N``, in (0, 1).
    """

    num_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    rate_jumps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps < 1:
            raise ValueError(f"DDPM needs num_steps >= 1, got {self.num_steps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"DDPM needs 0 < beta_start <= beta_end < 1, "
                f"got beta_start={self.beta_start}, beta_end={self.beta_end}"
            )

    @property
    def prior_std(self) -> float:
        """1: the prior is the standard normal."""
        return 1.0

    @cached_property
    def _log_alphas(self) -> Tensor:
        """``log alpha(i/N)`` for i = 0..N, float64."""
        betas = torch.linspace(self.beta_start, self.beta_end, self.num_steps, dtype=torch.float64)
        return torch.cat([betas.new_zeros(1), torch.log1p(-betas).cumsum(0) / 2])

    def _interval(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Start index of the interval of ``t``, and ``log alpha`` at its two ends."""
        table = self._log_alphas.to(t.device, t.dtype)
        index = (t * self.num_steps).floor().clamp(0, self.num_steps - 1).long()
        return index, table[index], table[index + 1]

    def log_alpha(self, t: float | Tensor) -> Tensor:
        """Linear interpolation of the table."""
        t = as_time(t)
        index, start, end = self._interval(t)
        return start + (t * self.num_steps - index) * (end - start)

    def alpha(self, t: float | Tensor) -> Tensor:
        """``exp(log_alpha(t))``; ``alpha(i/N)^2`` is DDPM's ``alpha_bar_i``."""
        return self.log_alpha(t).exp()

    def sigma(self, t: float | Tensor) -> Tensor:
        """``sqrt(1 - alpha^2)``."""
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def time(self, log_snr: float | Tensor) -> Tensor:
        """The inverse: ``log alpha = -log(1 + e^(-2 log_snr))/2``, looked up in the table."""
        log_snr = as_time(log_snr)
        log_alpha = -torch.nn.functional.softplus(-2 * log_snr) / 2
        table = self._log_alphas.to(log_alpha.device, log_alpha.dtype)
        index = torch.searchsorted(-table, -log_alpha.contiguous(), right=True) - 1
        index = index.clamp(0, self.num_steps - 1)
        part = (log_alpha - table[index]) / (table[index + 1] - table[index])
        return ((index + part) / self.num_steps).clamp(0, self.t_max)

    def drift_rate(self, t: float | Tensor) -> Tensor:
        """``N log(1 - beta_i)/2``, constant on each interval."""
        t = as_time(t)
        index, _, _ = self._interval(t)
        rates = self._log_alphas.diff() * self.num_steps  # in float64: neighbours nearly agree
        return rates.to(t.device, t.dtype)[index]

    def diffusion(self, t: float | Tensor) -> Tensor:
        """``sqrt(-2 d log alpha/dt)``, as for every variance-preserving process."""
        return (-2 * self.drift_rate(t)).sqrt()
