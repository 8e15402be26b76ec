r"""Algorithm 2 of EDM: Heun steps, each from a little more noise than the state has.

With ``y = x/alpha`` and ``q = sigma/alpha``, for every Gaussian process:

    q' = q_t (1 + gamma),  y' = y + sqrt(q'^2 - q_t^2) S_noise z
    y_s = y' + (q_s - q') (eps(y', q') + eps(y' + (q_s - q') eps(y', q'), q_s))/2

    gamma = min(S_churn/N, sqrt(2) - 1)  where  S_min <= q_t <= S_max,  else 0

Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
https://arxiv.org/abs/2206.00364; the settings of its table 5 are for data of std 0.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..noise import NoiseSource
from ..sde.base import Reverse
from .base import Solver, gaussian
from .heun import Heun


@dataclass(frozen=True)
class EDM(Solver):
    """Algorithm 2, deterministic without churn; then it is :class:`Heun`.

    Args:
        churn: ``S_churn >= 0``, noise added along the whole way, in units of steps.
        q_min: ``S_min``, noise level ``sigma/alpha`` below which none is added.
        q_max: ``S_max``, level above which none is added.
        noise_scale: ``S_noise``, standard deviation of the added noise.
    """

    churn: float = 0.0
    q_min: float = 0.0
    q_max: float = math.inf
    noise_scale: float = 1.0

    name: ClassVar[str] = "edm"
    order: ClassVar[float] = 2.0
    stochastic: ClassVar[bool] = False
    nfe_per_step: ClassVar[int] = 2
    default_steps: ClassVar[int | None] = 18
    default_grid: ClassVar[str | None] = "karras"

    def __post_init__(self) -> None:
        if not (self.churn >= 0 and self.noise_scale >= 0 and self.q_min <= self.q_max):
            raise ValueError(
                "EDM needs churn >= 0, noise_scale >= 0 and q_min <= q_max, got "
                f"churn={self.churn}, noise_scale={self.noise_scale}, "
                f"q_min={self.q_min}, q_max={self.q_max}"
            )
        object.__setattr__(self, "stochastic", self.churn > 0)

    @property
    def eta(self) -> float:
        """0: between the additions of noise it follows the probability-flow ODE."""
        return 0.0

    def init(self, reverse: Reverse, x: Tensor, times: Tensor, noise: NoiseSource | None) -> int:
        """``N``, the number of noise levels: the step to none at all is the denoising."""
        return len(times)

    def step(
        self,
        reverse: Reverse,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource | None,
        state: int | None = None,
    ) -> tuple[Tensor, Any]:
        """Up by ``gamma``, if at all, and down to ``s``."""
        sde = reverse.sde
        if self.churn > 0:
            q = torch.exp(-sde.log_snr(t))
            gamma = min(self.churn / (state or 1), math.sqrt(2) - 1)
            if bool((q >= self.q_min) & (q <= self.q_max)):
                # The network knows no more noise than at t_max.
                t_up = sde.time(-torch.log(q * (1 + gamma))).clamp_max(sde.t_max)
                a, v = sde.transition(t_up, t)
                x = a * x + self.noise_scale * v * gaussian(x, noise)
                t = t_up
        moved, _ = Heun().step(reverse, x, t, s, noise)
        return moved, state
