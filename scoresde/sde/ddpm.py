r"""DDPM's discrete table as a continuous process that meets it at every point.

With the table ``beta_1..beta_N`` and ``t_i = i/N``:

    log alpha(t_i) = 1/2 sum_{j <= i} log(1 - beta_j),  linear in between,  sigma^2 = 1 - alpha^2

which is the VP process whose rate is the constant ``-N log(1 - beta_i)`` on each interval. On the
uniform grid of N steps its transitions are DDPM's, number by number; :class:`VP` is the limit of
the linear table for many steps. The tables in use, ``u`` running from 0 to 1 along the table:

    linear         beta = b + (e - b) u                          alpha(1)^2 = 4.0e-5
    scaled-linear  sqrt(beta) = sqrt(b) + (sqrt(e) - sqrt(b)) u               7.3e-4
    cosine         beta_i = min(1 - f(i/N)/f((i-1)/N), 0.999)                 2.4e-9
                   f(t) = cos^2(pi/2 (t + 0.008)/1.008)
    sigmoid        beta = b + (e - b)/(1 + exp(6 - 12 u))                     4.0e-5

Sources: Denoising Diffusion Probabilistic Models (Ho et al., 2020),
https://arxiv.org/abs/2006.11239; Improved Denoising Diffusion Probabilistic Models (Nichol &
Dhariwal, 2021), https://arxiv.org/abs/2102.09672.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..config import unknown
from .base import GaussianSDE, as_time

SCHEDULES = ("linear", "scaled-linear", "cosine", "sigmoid")
MOST_STEPS = 1_000_000
"""Steps of the longest table that is made: a file that asks for more is no model."""


@dataclass(frozen=True)
class DDPM(GaussianSDE):
    """VP process through the points of a table of ``beta``.

    Args:
        num_steps: ``N``, the length of the table, up to a million.
        beta_start: ``b``, ``beta_1`` of a linear table, in (0, 1).
        beta_end: ``e``, ``beta_N`` of a linear table, in (0, 1); both are not read by ``cosine``.
        schedule: the rule of the table: ``"linear"``, ``"scaled-linear"`` (latent diffusion's),
            ``"cosine"`` (Nichol & Dhariwal's) or ``"sigmoid"``.
        betas: the table itself, each in (0, 1), instead of the four fields above; ``num_steps``
            is then its length.

    Raises:
        ConfigError: for an unknown schedule.
        ValueError: for a table that is empty or leaves (0, 1).
    """

    num_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    schedule: str = "linear"
    betas: tuple[float, ...] | None = None

    rate_jumps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule not in SCHEDULES:
            raise unknown("schedule of DDPM", self.schedule, SCHEDULES)
        if self.betas is not None:
            betas = tuple(float(beta) for beta in self.betas)
            wrong = [i for i, beta in enumerate(betas, 1) if not 0 < beta < 1]
            if wrong:
                raise ValueError(
                    f"DDPM needs every beta in (0, 1), got {betas[wrong[0] - 1]} as number "
                    f"{wrong[0]} of {len(betas)}"
                )
            object.__setattr__(self, "betas", betas)
            object.__setattr__(self, "num_steps", len(betas))
        if not 1 <= self.num_steps <= MOST_STEPS:
            raise ValueError(f"DDPM needs 1 <= num_steps <= {MOST_STEPS}, got {self.num_steps}")
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
    def _betas(self) -> Tensor:
        """``beta_1..beta_N``, float64."""
        if self.betas is not None:
            return torch.tensor(self.betas, dtype=torch.float64)
        b, e = self.beta_start, self.beta_end
        if self.schedule == "linear":
            return torch.linspace(b, e, self.num_steps, dtype=torch.float64)
        if self.schedule == "scaled-linear":
            return torch.linspace(b**0.5, e**0.5, self.num_steps, dtype=torch.float64) ** 2
        if self.schedule == "sigmoid":
            return (
                b + (e - b) * torch.linspace(-6, 6, self.num_steps, dtype=torch.float64).sigmoid()
            )
        t = torch.arange(self.num_steps + 1, dtype=torch.float64) / self.num_steps
        f = torch.cos(math.pi / 2 * (t + 0.008) / 1.008) ** 2
        return (1 - f[1:] / f[:-1]).clamp_max(0.999)

    @cached_property
    def _log_alphas(self) -> Tensor:
        """``log alpha(i/N)`` for i = 0..N, float64."""
        betas = self._betas
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
        log_alpha = -softplus(-2 * log_snr, threshold=50) / 2
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
