r"""Steps built on the exact transition kernel ``p(x_t | x_s) = N(a x_s, v^2 I)``.

Ancestral sampling draws from DDPM's posterior, with ``x_0`` at its mean:

    x_s = (x + v^2 score)/a + std z,    std = v sigma_s/sigma_t (small) or v (large)

or, entry by entry, between the two in their logarithms as a network has learned it:

    log std^2 = f log v^2 + (1 - f) log(v^2 sigma_s^2/sigma_t^2),    f = (v_hat + 1)/2

Reverse diffusion discretises the reverse SDE as the forward one is discretised:

    x_s = (2 - a) x + v^2 score + v z

``a`` and ``v`` belong to the step itself, whatever the grid, so no table of ``beta`` limits the
number of steps: DDPM's ``beta_i`` is ``v^2`` of a variance-preserving step.

Sources: Denoising Diffusion Probabilistic Models (Ho et al., 2020),
https://arxiv.org/abs/2006.11239; Improved Denoising Diffusion Probabilistic Models (Nichol &
Dhariwal, 2021), equation 15, https://arxiv.org/abs/2102.09672; Score-Based Generative Modeling
through Stochastic Differential Equations (Song et al., 2021), appendices E and F,
https://arxiv.org/abs/2011.13456.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import unknown
from ..noise import NoiseSource
from ..sde.base import Reverse, match
from .base import Solver, increment

VARIANCES = ("small", "large", "learned")


@dataclass(frozen=True)
class Ancestral(Solver):
    """DDPM's posterior step, for any Gaussian process.

    Args:
        variance: ``"small"``, exact where the data are one point, ``"large"``, exact where they
            are white noise of unit variance, or ``"learned"``, for networks with a head for it:
            in either case that of the step taken, on whatever grid.
    """

    variance: str = "small"

    order: ClassVar[float] = 1.0
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.variance not in VARIANCES:
            raise unknown("variance of Ancestral", self.variance, VARIANCES)

    def step(
        self,
        reverse: Reverse,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource | None,
        state: Any = None,
    ) -> tuple[Tensor, Any]:
        """``(x + v^2 score)/a + std z``."""
        a, v = reverse.sde.transition(t, s)
        sigma_t, sigma_s = reverse.sde.sigma(t), reverse.sde.sigma(s)
        if self.variance == "learned":
            eps, v_hat = reverse.noise_and_variance(x, t)
            push = match(-(v**2) / sigma_t, x) * eps
            std = match(v, x) * torch.exp((1 - v_hat) / 2 * log_ratio(sigma_t, sigma_s, x))
        else:
            push = match(v**2, x) * reverse.score(x, t)
            std = match(v * sigma_s / sigma_t if self.variance == "small" else v, x)
        mean = (x + push) / match(a, x)
        return mean + std * increment(x, noise, reverse.sde, t, s), state


def log_ratio(sigma_t: Tensor, sigma_s: Tensor, x: Tensor) -> Tensor:
    """``log(sigma_s/sigma_t) < 0``, of the small standard deviation by the large, kept finite."""
    ratio = sigma_s / sigma_t
    return match(ratio.clamp_min(torch.finfo(ratio.dtype).tiny).log(), x)


@dataclass(frozen=True)
class ReverseDiffusion(Solver):
    """Reverse diffusion step, the predictor of Song et al.'s VE sampler."""

    order: ClassVar[float] = 1.0
    stochastic: ClassVar[bool] = True

    def step(
        self,
        reverse: Reverse,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource | None,
        state: Any = None,
    ) -> tuple[Tensor, Any]:
        """``(2 - a) x + v^2 score + v z``."""
        a, v = reverse.sde.transition(t, s)
        mean = match(2 - a, x) * x + match(v**2, x) * reverse.score(x, t)
        return mean + match(v, x) * increment(x, noise, reverse.sde, t, s), state
