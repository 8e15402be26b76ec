r"""What the network ``F`` predicts, as four coefficients.

    eps_hat = c_skip x + c_out F(c_in x, c_noise),    x = alpha x_0 + sigma eps

Each class turns ``(alpha, sigma)`` into ``(c_in, c_skip, c_out, c_noise)``. Unless another label
is asked for, all condition the network on ``c_noise = log(sigma/alpha)/4``, minus a quarter of the
log-SNR, whatever the process.

Source: the form with four coefficients is that of Elucidating the Design Space of Diffusion-Based
Generative Models (Karras et al., 2022), https://arxiv.org/abs/2206.00364.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import noise_labels
from .config import build


class Coefficients(NamedTuple):
    """The four coefficients, each of the shape of ``alpha``."""

    c_in: Tensor
    c_skip: Tensor
    c_out: Tensor
    c_noise: Tensor


@dataclass(frozen=True)
class Parameterization(ABC):
    """Meaning of a network's output.

    Args:
        sigma_data: standard deviation of the data in model range, which scales the input to unit
            variance: ``c_in = 1 / sqrt(alpha^2 sigma_data^2 + sigma^2)``.
        scale_input: whether the input is scaled; otherwise ``c_in = 1``.
        label: what the network is told about the noise level, one of
            :mod:`scoresde.noise_labels`, its name, or its section.
    """

    sigma_data: float = 1.0
    scale_input: bool = True
    label: Any = "log-noise"

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", build(self.label, noise_labels, "label"))
        if not self.sigma_data > 0:
            raise ValueError(f"{type(self).__name__} needs sigma_data > 0, got {self.sigma_data}")

    @abstractmethod
    def skip_and_out(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """``(c_skip, c_out)``."""

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Coefficients:
        """All four coefficients at ``(alpha, sigma)``."""
        if self.scale_input:
            c_in = 1 / (alpha**2 * self.sigma_data**2 + sigma**2).sqrt()
        else:
            c_in = torch.ones_like(sigma)
        return Coefficients(c_in, *self.skip_and_out(alpha, sigma), self.label(alpha, sigma))


class Eps(Parameterization):
    """``F`` predicts the noise: ``eps_hat = F``."""

    def skip_and_out(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """``(0, 1)``."""
        return torch.zeros_like(sigma), torch.ones_like(sigma)


class ScaledScore(Parameterization):
    """``F`` predicts ``sigma score``, the noise with its sign turned: ``eps_hat = -F``."""

    def skip_and_out(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """``(0, -1)``."""
        return torch.zeros_like(sigma), -torch.ones_like(sigma)


class X0(Parameterization):
    """``F`` predicts the data: ``eps_hat = (x - alpha F)/sigma``."""

    def skip_and_out(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """``(1/sigma, -alpha/sigma)``."""
        return 1 / sigma, -alpha / sigma


class V(Parameterization):
    """``F`` predicts ``v = alpha eps - sigma x_0``.

    ``eps_hat = (sigma x + alpha F)/(alpha^2 + sigma^2)``. Source: Progressive Distillation for
    Fast Sampling of Diffusion Models (Salimans & Ho, 2022), https://arxiv.org/abs/2202.00512.
    """

    def skip_and_out(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """``(sigma, alpha) / (alpha^2 + sigma^2)``."""
        power = alpha**2 + sigma**2
        return sigma / power, alpha / power


class RawScore(Parameterization):
    """``F`` predicts the score: ``eps_hat = -sigma F``."""

    def skip_and_out(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """``(0, -sigma)``."""
        return torch.zeros_like(sigma), -sigma


@dataclass(frozen=True)
class Karras(Parameterization):
    """EDM preconditioning: unit-variance input and target at every noise level.

    With ``q = sigma/alpha`` and ``D(x/alpha; q) = x_0``: ``c_skip = sigma/(sigma^2 + alpha^2
    sigma_data^2)`` and ``c_out = -alpha sigma_data/sqrt(sigma^2 + alpha^2 sigma_data^2)``.
    """

    sigma_data: float = 0.5

    def skip_and_out(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Skip and output coefficients of ``eps_hat``."""
        power = sigma**2 + alpha**2 * self.sigma_data**2
        return sigma / power, -alpha * self.sigma_data / power.sqrt()


__all__ = ["X0", "Eps", "Karras", "RawScore", "ScaledScore", "V"]
