r"""Diffusion posterior sampling: the measurement is seen through the denoised data alone.

    grad log p(y | x_t) = J^T A^T r / s(t)^2,    s(t)^2 = noise_std^2 + r.(A V A^T r) / r.r

``p(y | x_t)`` is taken as ``N(A x0_hat, s(t)^2 I)``. Here ``s(t)^2`` is its variance along the
residual, as the score's own covariance ``V`` has it: the product ``V A^T r`` is the guidance
itself, so it costs nothing, no direction is pulled further than the measurement asks, and for
Gaussian data and one number measured it is exact.

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

import torch
from torch import Tensor

from .conjugate import dot, scaled
from .measured import Denoised, Measured, beside

PUBLISHED = 1000
"""Steps of the published sampler, which its ``zeta`` belongs to."""


@dataclass(frozen=True, eq=False)
class DPS(Measured):
    """A score led by the gradient of the squared residual.

    Args:
        score, operator, y, noise_std: see :class:`.Measured`.
        zeta: size of the published step, >= 0 (0.3 to 1 there, on pictures); None for the rule
            with ``s(t)``.
    """

    zeta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zeta is not None and not 0 <= self.zeta < math.inf:
            raise ValueError(f"DPS needs a finite zeta >= 0, got {self.zeta}")

    def pull(self, at: Denoised, r: Tensor) -> Tensor:
        """``V^T A^T r / s(t)^2``, or the same with the published factor."""
        if self.zeta is None:
            return scaled(self.operator, at.spread, r, r, self.noise_std**2)
        # grad |r| = -J^T A^T r/|r|
        length = dot(r, r).clamp_min(torch.finfo(r.dtype).tiny).sqrt()
        step = self.zeta * PUBLISHED / (self.sde.t_max * at.diffusion**2)
        return at.spread(self.operator.adjoint(beside(step, r) * r / beside(length, r)))
