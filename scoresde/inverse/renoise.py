r"""DDIM steps whose noise is drawn anew, in part or whole.

    x_s = alpha_s x_0' + sigma_s (sqrt(1 - zeta) eps' + sqrt(zeta) z)
    eps' = (x_t - alpha_t x_0')/sigma_t

``zeta = 0`` is DDIM. With ``zeta = 1`` the state keeps nothing but the denoised data: where these
were brought to agree with a measurement, each step begins again from something that does, and what
the noise had of the disagreement is forgotten. It follows no member of the reverse family, and is
no solver for a score that is not led: it would come to have too little variance.

Source: Denoising Diffusion Models for Plug-and-Play Image Restoration (Zhu et al., 2023),
algorithm 1, https://arxiv.org/abs/2305.08995.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..noise import NoiseSource
from ..sde.base import Reverse, match
from ..solvers.base import Solver, gaussian


@dataclass(frozen=True)
class Renoise(Solver):
    """Steps that draw a share of the noise anew.

    Args:
        zeta: the share, in [0, 1].
    """

    zeta: float = 0.8

    order: ClassVar[float] = 1.0
    stochastic: ClassVar[bool] = True
    default_steps: ClassVar[int | None] = 100

    def __post_init__(self) -> None:
        if not 0 <= self.zeta <= 1:
            raise ValueError(f"Renoise needs zeta in [0, 1], got {self.zeta}")

    def step(
        self,
        reverse: Reverse,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource | None,
        state: Any = None,
    ) -> tuple[Tensor, Any]:
        """``alpha_s x_0' + sigma_s (sqrt(1 - zeta) eps' + sqrt(zeta) z)``."""
        sde, eps = reverse.sde, reverse.noise(x, t)
        ratio = sde.alpha(s) / sde.alpha(t)
        kept = sde.sigma(s) * (1 - self.zeta) ** 0.5 - ratio * sde.sigma(t)
        fresh = sde.sigma(s) * self.zeta**0.5
        x = match(ratio, x) * x + match(kept, x) * eps
        return x + match(fresh, x) * gaussian(x, noise), state
