r"""Steps built on the exact transition kernel ``p(x_t | x_s) = N(a x_s, v^2 I)``.

Ancestral sampling draws from DDPM's posterior, with ``x_0`` at its mean:

    x_s = (x + v^2 score)/a + std z,    std = v sigma_s/sigma_t (small) or v (large)

Reverse diffusion discretises the reverse SDE as the forward one is discretised:

    x_s = (2 - a) x + v^2 score + v z

``a`` and ``v`` belong to the step itself, whatever the grid, so no table of ``beta`` limits the
number of steps: DDPM's ``beta_i`` is ``v^2`` of a variance-preserving step.

Sources: Denoising Diffusion Probabilistic Models (Ho et al., 2020),
https://arxiv.org/abs/2006.11239; Score-Based Generative Modeling through Stochastic Differential
Equations (Song et al., 2021), appendices E and F, https://arxiv.org/abs/2011.13456.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..config import unknown
from ..noise import NoiseSource
from ..sde.base import Reverse, match
from .base import Solver, increment


@dataclass(frozen=True)
class Ancestral(Solver):
    """DDPM's posterior step, for any Gaussian process.

    Args:
        variance: ``"small"``, exact where the data are one point, or ``"large"``, exact where
            they are white noise of unit variance.
    """

    variance: str = "small"

    order: ClassVar[float] = 1.0
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.variance not in ("small", "large"):
            raise unknown("variance of Ancestral", self.variance, ("small", "large"))

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
        small = self.variance == "small"
        std = v * reverse.sde.sigma(s) / reverse.sde.sigma(t) if small else v
        mean = (x + match(v**2, x) * reverse.score(x, t)) / match(a, x)
        return mean + match(std, x) * increment(x, noise, reverse.sde, t, s), state


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
