r"""Weights of the denoising loss, as factors on ``|eps_hat - eps|^2``; one class each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..sde.base import GaussianSDE


class Weight(ABC):
    """A factor ``weight(sde, t) >= 0`` of the shape of ``t``."""

    @abstractmethod
    def __call__(self, sde: GaussianSDE, t: Tensor) -> Tensor:
        """The factor at time ``t``."""


@dataclass(frozen=True)
class Simple(Weight):
    """``1``: DDPM's L_simple.

    Source: Denoising Diffusion Probabilistic Models (Ho et al., 2020), equation 14,
    https://arxiv.org/abs/2006.11239.
    """

    def __call__(self, sde: GaussianSDE, t: Tensor) -> Tensor:
        """``1``."""
        return torch.ones_like(t)


@dataclass(frozen=True)
class Likelihood(Weight):
    """``g^2 / sigma^2``: score matching weighted by ``g^2``, which bounds the likelihood.

    Source: Maximum Likelihood Training of Score-Based Diffusion Models (Song et al., 2021),
    https://arxiv.org/abs/2101.09258.
    """

    def __call__(self, sde: GaussianSDE, t: Tensor) -> Tensor:
        """``g(t)^2 / sigma(t)^2``, which is ``-2 d log_snr/dt``."""
        return (sde.diffusion(t) / sde.sigma(t)) ** 2


@dataclass(frozen=True)
class Data(Weight):
    """``sigma^2 / alpha^2``: the squared error of the denoised data."""

    name: ClassVar[str] = "x0"

    def __call__(self, sde: GaussianSDE, t: Tensor) -> Tensor:
        """``exp(-2 log_snr)``."""
        return torch.exp(-2 * sde.log_snr(t))


@dataclass(frozen=True)
class EDM(Weight):
    """``(q^2 + sigma_data^2) / sigma_data^2`` with ``q = sigma/alpha``.

    Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al.,
    2022), table 1, https://arxiv.org/abs/2206.00364.
    """

    sigma_data: float = 0.5

    def __call__(self, sde: GaussianSDE, t: Tensor) -> Tensor:
        """``1 + (q / sigma_data)^2``."""
        return 1 + torch.exp(-2 * sde.log_snr(t)) / self.sigma_data**2


@dataclass(frozen=True)
class MinSNR(Weight):
    """``min(snr, gamma) / snr`` with ``snr = alpha^2/sigma^2``.

    The paper states it for each prediction: ``min(snr, gamma)`` on the error of the data,
    ``min(snr, gamma)/snr`` on that of the noise, ``min(snr, gamma)/(snr + 1)`` on that of ``v``.
    On a variance-preserving process these are one and the same loss, so the weight does not ask
    what the network predicts.

    Source: Efficient Diffusion Training via Min-SNR Weighting Strategy (Hang et al., 2023),
    https://arxiv.org/abs/2303.09556.
    """

    gamma: float = 5.0

    def __call__(self, sde: GaussianSDE, t: Tensor) -> Tensor:
        """``min(1, gamma / snr)``."""
        return (self.gamma * torch.exp(-2 * sde.log_snr(t))).clamp_max(1)


@dataclass(frozen=True)
class Velocity(Weight):
    """``(g^2 / (2 sigma))^2``: conditional flow matching.

    Since ``u = f x + g^2/(2 sigma) eps`` is the velocity ``alpha' x_0 + sigma' eps`` of the path
    through ``x_0`` and ``eps``, the weighted error is ``|u_hat(x, t) - (alpha' x_0 + sigma'
    eps)|^2``: on the straight path ``|v_hat - (eps - x_0)|^2``.

    Source: Flow Matching for Generative Modeling (Lipman et al., 2023),
    https://arxiv.org/abs/2210.02747.
    """

    def __call__(self, sde: GaussianSDE, t: Tensor) -> Tensor:
        """``(g^2 / (2 sigma))^2``."""
        return (sde.diffusion(t) ** 2 / (2 * sde.sigma(t))) ** 2


__all__ = ["EDM", "Data", "Likelihood", "MinSNR", "Simple", "Velocity"]
