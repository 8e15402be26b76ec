r"""DDIM: the noise estimate is kept for the step, exactly integrated.

    x_s = (alpha_s/alpha_t)(x - sigma_t eps) + sqrt(sigma_s^2 - std^2) eps + std z
    std = eta v sigma_s/sigma_t,    v^2 = sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2

``eta = 0`` is the exponential Euler method for the probability-flow ODE (DPM-Solver-1);
``eta = 1`` is ancestral sampling with the small variance.

Source: Denoising Diffusion Implicit Models (Song et al., 2021), equations 12 and 16,
https://arxiv.org/abs/2010.02502.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..noise import NoiseSource
from ..sde.base import Reverse, match
from .base import Solver, increment


@dataclass(frozen=True)
class DDIM(Solver):
    """DDIM steps, deterministic by default.

    Args:
        eta: share of the noise of ancestral sampling, in [0, 1].
    """

    eta: float = 0.0

    order: ClassVar[float] = 1.0
    stochastic: ClassVar[bool] = False
    default_steps: ClassVar[int | None] = 50

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"DDIM needs eta in [0, 1], got {self.eta}")
        object.__setattr__(self, "stochastic", self.eta > 0)

    def step(
        self,
        reverse: Reverse,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource | None,
        state: Any = None,
    ) -> tuple[Tensor, Any]:
        """``(alpha_s/alpha_t)(x - sigma_t eps) + sqrt(sigma_s^2 - std^2) eps + std z``."""
        a, v = reverse.sde.transition(t, s)
        sigma_t, sigma_s = reverse.sde.sigma(t), reverse.sde.sigma(s)
        std = self.eta * v * sigma_s / sigma_t
        along = (sigma_s**2 - std**2).clamp_min(0).sqrt() - sigma_t / a
        x = x / match(a, x) + match(along, x) * reverse.noise(x, t)
        if self.stochastic:
            x = x + match(std, x) * increment(x, noise, reverse.sde, t, s)
        return x, state
