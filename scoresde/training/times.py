r"""Training times: distributions on ``[t_min, t_max]`` given by their quantile functions.

Uniform numbers ``u`` become times. A batch may take independent ``u``, or the low-discrepancy
sequence ``u_i = (u_0 + i/B) mod 1``, each of whose members is uniform while the batch as a whole
covers the interval evenly (Variational Diffusion Models, Kingma et al., 2021). A source of noise
that knows its place in a global batch, as :class:`~scoresde.training.step_noise.StepNoise`, gives
each process its part of the one sequence.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config import ConfigError
from ..noise import KeyedNoise, NoiseSource
from ..sde.base import GaussianSDE


def uniform(count: int, source: NoiseSource | None = None) -> Tensor:
    """Uniform numbers in [0, 1), float64 on the CPU, one an item of the batch.

    A keyed source makes them there, so that no device is waited for.
    """
    if isinstance(source, KeyedNoise):
        return KeyedNoise.uniform(source, (count,), "cpu", torch.float64)
    device = source.device if source is not None else None
    # Drawn in float32 for devices without float64.
    return torch.rand((count,), generator=source, device=device).cpu().double()


def low_discrepancy(count: int, source: NoiseSource | None = None) -> Tensor:
    """``u_i = (u_0 + i/B) mod 1`` for this process's items ``i`` of the ``B`` of the batch."""
    shared = getattr(source, "shared", None)
    if shared is None:
        offset, start, total = uniform(1, source), 0, count
    else:
        offset, start, total = shared(), source.start, source.total  # type: ignore[union-attr]
    return (torch.arange(start, start + count, dtype=torch.float64) / total + offset) % 1


@dataclass(frozen=True)
class Times(ABC):
    """A distribution of training times.

    Args:
        stratified: whether the batch is a low-discrepancy sequence.
    """

    stratified: bool = False

    def __call__(
        self, sde: GaussianSDE, batch: int, generator: NoiseSource | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(t, correction)``, each ``(batch,)`` in float64.

        The correction is the density of uniform times over that of ``t`` where the distribution
        only serves to lower the variance, and 1 where it is part of the objective.
        """
        t = self.quantile(sde, self.uniforms(batch, generator))
        return t, self.correction(sde, t)

    def uniforms(self, batch: int, source: NoiseSource | None) -> Tensor:
        """Uniform numbers of the batch, ``(batch,)``, clear of 0 and 1."""
        u = low_discrepancy(batch, source) if self.stratified else uniform(batch, source)
        return u.clamp(1e-7, 1 - 1e-7)

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
class LogitNormal(LogNormal):
    """``logit(t) ~ N(mean, std^2)`` on the straight path, as in Stable Diffusion 3.

    There ``logit(t) = log(sigma/alpha)``, so that it is the log-normal distribution with other
    numbers, and as such serves every process.

    Source: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al.,
    2024), section 3.1, https://arxiv.org/abs/2403.03206.
    """

    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True)
class Steps(Times):
    """The times ``n t_max/N`` of a chain of ``N`` steps, ``n`` uniform in 1..N.

    Args:
        steps: ``N``; None for the length of a table's process, and 1000 for any other.
    """

    stratified: bool = True
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 2:
            raise ValueError(f"steps must be at least 2, got {self.steps}")

    def length(self, sde: GaussianSDE) -> int:
        """``N`` on this process."""
        return self.steps or int(getattr(sde, "num_steps", 1000))

    def quantile(self, sde: GaussianSDE, u: Tensor) -> Tensor:
        """``(floor(N u) + 1) t_max/N``.

        Raises:
            ConfigError: for a chain whose first step lies below the trained times.
        """
        n = self.length(sde)
        if sde.t_max / n < sde.t_min:
            raise ConfigError(
                f"objective.times.steps={n} starts at t={sde.t_max / n:g}, "
                f"below the trained t_min={sde.t_min:g}"
            )
        return ((u * n).floor() + 1) * sde.t_max / n


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


__all__ = ["Importance", "LogNormal", "LogitNormal", "LowDiscrepancy", "Steps", "Uniform"]
