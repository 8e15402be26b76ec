r"""What a network is told about the noise level: ``c_noise`` as a function of ``(alpha, sigma)``.

Networks of this toolkit are told a quarter of the log of the noise level, whatever the process.
Those of others are told a step of the chain they were trained on. Both are functions of the
log-SNR ``lambda = log(alpha/sigma)``, so that a network trained on one process serves any other
of the same data. A step of a chain becomes a real number: ``scale * time(lambda) + offset``, where
``time`` inverts the log-SNR of the chain's own process. Between two steps of a table
(:class:`~scoresde.DDPM`) that interpolates the step linearly in ``log alpha``; at the steps
themselves it gives whole numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from .config import ConfigError, build
from .sde.base import GaussianSDE
from .sde.ddpm import MOST_STEPS


class NoiseLabel(ABC):
    """A map from ``(alpha, sigma)`` to the label ``c_noise``, elementwise."""

    widen: ClassVar[bool] = True
    """Whether the label is computed in float64, from times of any precision."""

    @abstractmethod
    def __call__(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """``c_noise``, of the shape of ``alpha``."""


@dataclass(frozen=True)
class LogNoise(NoiseLabel):
    """``c_noise = scale * log(q / unit)``, ``q = sigma/alpha`` the noise level.

    Args:
        scale: 1/4 in EDM and here.
        unit: the noise level that is zero.
    """

    scale: float = 0.25
    unit: float = 1.0

    def __post_init__(self) -> None:
        if not self.unit > 0:
            raise ValueError(f"LogNoise needs unit > 0, got {self.unit}")

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """``scale * (log sigma - log alpha - log unit)``."""
        return self.scale * (sigma.log() - alpha.log() - math.log(self.unit))


@dataclass(frozen=True)
class NoiseLevel(NoiseLabel):
    """``c_noise = sigma/alpha``, as NCSN++ for the VE process takes it.

    In the precision of the time, as the published networks do: they turn the logarithm of the
    level into waves so short that its last digit in float32 shows in the fifth of the score.
    """

    widen: ClassVar[bool] = False

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """``sigma / alpha``."""
        return sigma / alpha


@dataclass(frozen=True)
class Time(NoiseLabel):
    """``c_noise = scale * t + offset``, ``t`` the time at which ``sde`` has this log-SNR.

    Args:
        sde: the process the network was trained on, its name, or its section.
        scale: 999 for Song et al.'s continuous networks, N for a table of N steps.
        offset: 0, or -1 for a table, whose step ``i = 0..N-1`` is the time ``(i + 1)/N``.
    """

    sde: Any = "vp"
    scale: float = 999.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        from . import sde

        process = build(self.sde, sde, "sde of the label")
        if not isinstance(process, GaussianSDE):
            raise ConfigError(f"the label needs a Gaussian process, not {process!r}")
        object.__setattr__(self, "sde", process)

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """``scale * sde.time(log alpha - log sigma) + offset``."""
        return self.scale * self.sde.time(alpha.log() - sigma.log()) + self.offset


@dataclass(frozen=True)
class NearestStep(NoiseLabel):
    r"""The step of EDM's version of improved DDPM whose noise level is nearest to ``sigma/alpha``.

        u_N = 0,  u_{j-1} = sqrt((u_j^2 + 1) / max(a_{j-1}/a_j, C_1) - 1),
        a_j = sin^2(pi/2 j / (N (C_2 + 1))),    c_noise = N - 1 - argmin_j |u_j - q|

    A label that jumps makes the probability-flow ODE jump: adaptive solvers take more steps. The
    original computes ``u`` in float32, whose rounding moves the smallest level by 5e-4 of itself
    (0.0064223 for 0.0064254): the label of each level is the same, that of noise levels in the
    middle between two (3 in 10000) is a neighbour.

    Args:
        num_steps: ``N``.
        c_1: least ratio of neighbouring ``a``.
        c_2: shift of the cosine schedule.

    Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al.,
    2022), table 1, https://arxiv.org/abs/2206.00364.
    """

    num_steps: int = 1000
    c_1: float = 0.001
    c_2: float = 0.008

    def __post_init__(self) -> None:
        if not 1 <= self.num_steps <= MOST_STEPS:
            raise ValueError(
                f"NearestStep needs 1 <= num_steps <= {MOST_STEPS}, got {self.num_steps}"
            )

    @cached_property
    def levels(self) -> Tensor:
        """``u_0..u_N``, float64, decreasing to 0."""
        j = torch.arange(self.num_steps + 1, dtype=torch.float64)
        a = torch.sin(math.pi / 2 * j / self.num_steps / (self.c_2 + 1)) ** 2
        u = torch.zeros_like(a)
        for k in range(self.num_steps, 0, -1):
            u[k - 1] = ((u[k] ** 2 + 1) / (a[k - 1] / a[k]).clamp_min(self.c_1) - 1).sqrt()
        return u

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """``N - 1 - argmin_j |u_j - sigma/alpha|``."""
        q = sigma / alpha
        u = self.levels.to(q.device, q.dtype)
        nearest = (u - q.reshape(-1, 1)).abs().argmin(1).reshape(q.shape)
        return (self.num_steps - 1 - nearest).to(q.dtype)


__all__ = ["LogNoise", "NearestStep", "NoiseLevel", "Time"]
