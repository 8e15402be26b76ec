r"""Pseudo-inverse guidance: data seen from a noisy state spread alike in all directions.

    w = (noise_std^2 I + r_t^2 A A^T)^{-1} r,    r_t^2 = s^2 q^2/(s^2 + q^2)/strength
    score(x_t | y) = score(x_t) + J^T A^T w,     q = sigma/alpha

With ``strength = 1`` and ``s = sigma_data``, ``r_t^2`` is the variance of ``p(x_0 | x_t)`` for
data ``N(0, s^2 I)``, and for those the score is exact. Data in clusters spread less than that,
once the state says which cluster: on mixtures ``s`` of 0.6 standard deviations and ``strength =
8`` come closest to exact posteriors, and are the defaults. Such a pull is too strong for long
steps: at no cost, it is held to ``reach`` times what is best along ``w`` by the score's own
covariance (see :func:`.reach_of`). With ``noise_std = 0``, ``w = (A A^T)^+ r / r_t^2``, the
pseudo-inverse of the name.

Source: Pseudoinverse-Guided Diffusion Models for Inverse Problems (Song et al., 2023),
https://openreview.net/forum?id=9_gsMA8MRKQ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .conjugate import reach_of, scaled
from .measured import Denoised, Scaled, beside

WITHIN = 0.6
"""Spread of data within a cluster, as a share of that of all data."""


@dataclass(frozen=True, eq=False)
class PGDM(Scaled):
    """A score led by a measurement through the pseudo-inverse of the operator.

    Args:
        score, operator, y, noise_std: see :class:`.Measured`.
        sigma_data: ``s``, standard deviation of the data within a cluster, in model range, > 0;
            0.6 times that of the wrapped model's parameterization if None.
        strength: of the guidance, > 0.
        reach: times its best length that a pull may have, >= 1 and finite.
    """

    strength: float = 8.0
    reach: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.strength < math.inf:
            raise ValueError(f"PGDM needs a finite strength > 0, got {self.strength}")
        if not 1 <= self.reach < math.inf:
            raise ValueError(f"PGDM needs a finite reach >= 1, got {self.reach}")

    @classmethod
    def suited(cls, steps: int) -> dict[str, Any]:
        """The reach that a number of steps bears."""
        return {"reach": reach_of(steps)}

    @property
    def scale(self) -> float:
        """``sigma_data``, or a share of the standard deviation that the wrapped model knows."""
        return super().scale * (WITHIN if self.sigma_data is None else 1)

    def pull(self, at: Denoised, r: Tensor) -> Tensor:
        """``V^T A^T (noise_std^2 I + r_t^2 A A^T)^{-1} r``, held."""
        w = self.operator.solve(r, self.noise_std**2, beside(at.variance / self.strength, r))
        return scaled(self.operator, at.spread, w, r, self.noise_std**2, self.reach, full=1.0)
