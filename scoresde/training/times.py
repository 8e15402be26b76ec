r"""Training times: distributions on ``[t_min, t_max]`` given by their quantile functions.

Uniform numbers ``u`` become times. A batch may take independent ``u``, or the low-discrepancy
sequence ``u_i = (u_0 + i/B) mod 1``, each of whose members is uniform while the batch as a whole
covers the interval evenly (Variational Diffusion Models, Kingma et al., 2021).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..sde.base import GaussianSDE


@dataclass(frozen=True)
class Times(ABC):
    """A distribution of training times.

    Args:
        stratified: whether the batch is a low-discrepancy sequence.
    """

    stratified: bool = False

    def __call__(
        self, sde: GaussianSDE, batch: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(t, correction)``, each ``(batch,)`` in float64.

        The correction is the density of uniform times over that of ``t`` where the distribution
        only serves to lower the variance, and 1 where it is part of the objective.
        """
        device = generator.device if generator is not None else None
        shape = (1,) if self.stratified else (batch,)
        # Drawn in float32 for devices without float64; the midpoint keeps clear of 0 and 1.
        u = torch.rand(shape, generator=generator, device=device).cpu().double()
        if self.stratified:
            u = (u + torch.arange(batch, dtype=torch.float64) / batch) % 1
        t = self.quantile(sde, u.clamp(1e-7, 1 - 1e-7))
        return t, self.correction(sde, t)

    @abstractmethod
    def quantile(self, sde: GaussianSDE, u: Tensor) -> Tensor:
        """Time below which a share ``u`` of the distribution lies."""

    def correction(self, sde: GaussianSDE, t: Tensor) -> Tensor:
        """1 unless the distribution is an importance-sampling one."""
        return torch.ones_like(t)


@dataclass(frozen=True)
class Uniform(Times):
    """Uniform on ``[t_min, t_max]``."""

    def quantile(self, sde: GaussianSDE, u: Tensor) -> Tensor:
        """``t_min + u (t_max - t_min)``."""
        return sde.t_min + u * (sde.t_max - sde.t_min)


@dataclass(frozen=True)
class LowDiscrepancy(Uniform):
    """Uniform on ``[t_min, t_max]``, each batch spread evenly."""

    stratified: bool = True


@dataclass(frozen=True)
class LogNormal(Times):
    """``log(sigma/alpha) ~ N(mean, std^2)``, clipped to the trained times.

    Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al.,
    2022), table 1, https://arxiv.org/abs/2206.00364.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"log-normal times need std > 0, got {self.std}")

    def quantile(self, sde: GaussianSDE, u: Tensor) -> Tensor:
        """``time(-(mean + std Phi^-1(u)))``."""
        log_q = self.mean + self.std * math.sqrt(2) * torch.erfinv(2 * u - 1)
        return sde.time(-log_q).clamp(sde.t_min, sde.t_max)


@dataclass(frozen=True)
class Importance(Times):
    """Density proportional to the likelihood weight ``g^2/sigma^2``.

    Since ``g^2/sigma^2 = -2 d log_snr/dt``, these are the times of a uniform log-SNR, for every
    Gaussian process. The correction keeps every weighted loss unbiased; with the likelihood weight
    their product is constant, the least variance that a time distribution can give.

    Source: Maximum Likelihood Training of Score-Based Diffusion Models (Song et al., 2021),
    https://arxiv.org/abs/2101.09258.
    """

    stratified: bool = True
    name: ClassVar[str] = "importance"

    def quantile(self, sde: GaussianSDE, u: Tensor) -> Tensor:
        """``time`` of the log-SNR a share ``u`` of the way from ``t_min`` to ``t_max``."""
        start, end = sde.log_snr(sde.t_min), sde.log_snr(sde.t_max)
        return sde.time(start + u * (end - start))

    def correction(self, sde: GaussianSDE, t: Tensor) -> Tensor:
        """``1 / (p(t) (t_max - t_min))``."""
        span = sde.log_snr(sde.t_min) - sde.log_snr(sde.t_max)
        rate = (sde.diffusion(t) / sde.sigma(t)) ** 2 / 2
        return span / rate / (sde.t_max - sde.t_min)


__all__ = ["Importance", "LogNormal", "LowDiscrepancy", "Uniform"]
