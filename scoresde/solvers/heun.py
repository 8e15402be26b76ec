r"""Heun's method for the probability-flow ODE in its straightest coordinates.

With ``y = x/alpha`` and ``q = sigma/alpha`` the ODE of every Gaussian process is

    dy/dq = eps(x, t)

and one step is the trapezoid, its far end estimated by Euler's method:

    y' = y + (q_s - q_t) eps(x, t)
    y_s = y + (q_s - q_t) (eps(x, t) + eps(alpha_s y', s))/2

For ``alpha = 1`` this is algorithm 2 of EDM without churn. The denoising that ends
:func:`scoresde.sample` is its last Euler step, to ``sigma = 0``: the published 18 noise levels (35
evaluations) are ``steps=17``.

Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
https://arxiv.org/abs/2206.00364.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..noise import NoiseSource
from ..sde.base import Reverse, match
from .base import Solver


@dataclass(frozen=True)
class Heun(Solver):
    """Heun steps of ``dy/dq = eps``, two evaluations each."""

    order: ClassVar[float] = 2.0
    stochastic: ClassVar[bool] = False
    nfe_per_step: ClassVar[int] = 2
    default_steps: ClassVar[int | None] = 18
    default_grid: ClassVar[str | None] = "karras"

    def step(
        self,
        reverse: Reverse,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource | None,
        state: Any = None,
    ) -> tuple[Tensor, Any]:
        """``alpha_s (y + (q_s - q_t) (eps_t + eps_s)/2)``."""
        ratio = reverse.sde.alpha(s) / reverse.sde.alpha(t)
        span = reverse.sde.sigma(s) - ratio * reverse.sde.sigma(t)  # alpha_s (q_s - q_t)
        scaled, eps = match(ratio, x) * x, reverse.noise(x, t)
        ahead = reverse.noise(scaled + match(span, x) * eps, s)
        return scaled + match(span / 2, x) * (eps + ahead), state
