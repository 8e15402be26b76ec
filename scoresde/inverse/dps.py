r"""Diffusion posterior sampling: the measurement is seen through the denoised data alone.

    grad log p(y | x_t) = c J^T A^T r,    p(y | x_t) = N(y; A x0_hat, noise_std^2 I)

That is ``c = 1/noise_std^2``, and no step bears it but short ones late. So ``c`` is held to
``reach`` times what is best along the residual by the score's own covariance ``V``,

    c = min(1/noise_std^2, reach/s(t)^2),    s(t)^2 = noise_std^2 + r.(A V A^T r)/r.r

which costs nothing, since the product ``V A^T r`` is the guidance itself. ``reach = 1`` pulls no
direction further than the measurement asks, and is exact for Gaussian data and one number
measured. Longer pulls commit to the modes of the data that the measurement has chosen.

The published rule has no ``s(t)``; each of its 1000 ancestral steps moves by

    x <- x - zeta grad |r|

With ``zeta`` that is what a step of the reverse SDE over a thousandth of the process's time does:
the score gains ``-zeta 1000/(g^2 t_max) grad |r|``, whatever the number of steps. At fewer steps
than some hundreds of them it is unstable where strong, and weak where stable.

Source: Diffusion Posterior Sampling for General Noisy Inverse Problems (Chung et al., 2023),
https://arxiv.org/abs/2209.14687.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .conjugate import dot, reach_of, scaled
from .measured import Denoised, Measured, beside

PUBLISHED = 1000
"""Steps of the published sampler, which its ``zeta`` belongs to."""


@dataclass(frozen=True, eq=False)
class DPS(Measured):
    """A score led by the gradient of the squared residual.

    Args:
        score, operator, y, noise_std: see :class:`.Measured`.
        reach: times its best length that a pull may have, >= 1 and finite.
        zeta: size of the published step, >= 0 (0.3 to 1 there, on pictures); None for the rule
            with ``s(t)``.
    """

    reach: float = 2.0
    zeta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.reach < math.inf:
            raise ValueError(f"DPS needs a finite reach >= 1, got {self.reach}")
        if self.zeta is not None and not 0 <= self.zeta < math.inf:
            raise ValueError(f"DPS needs a finite zeta >= 0, got {self.zeta}")

    @classmethod
    def suited(cls, steps: int) -> dict[str, Any]:
        """The reach that a number of steps bears."""
        return {"reach": reach_of(steps)}

    def pull(self, at: Denoised, r: Tensor) -> Tensor:
        """``c V^T A^T r``, or the same with the published factor."""
        if self.zeta is None:
            power = self.noise_std**2
            full = 1 / power if power else math.inf
            return scaled(self.operator, at.spread, r, r, power, self.reach, full)
        # grad |r| = -J^T A^T r/|r|
        length = dot(r, r).clamp_min(torch.finfo(r.dtype).tiny).sqrt()
        step = self.zeta * PUBLISHED / (self.sde.t_max * at.diffusion**2)
        return at.spread(self.operator.adjoint(beside(step, r) * r / beside(length, r)))
