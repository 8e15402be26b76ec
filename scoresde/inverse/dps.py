r"""Diffusion posterior sampling: the denoised data are taken to be the data, up to one variance.

    grad log p(y | x_t) = J^T A^T r / s(t)^2,    s(t)^2 = noise_std^2 + |A|^2 r_t^2

``|A|`` is the largest singular value of the operator and ``r_t^2`` the variance of
``p(x_0 | x_t)`` for data ``N(0, sigma_data^2 I)``: no direction is pulled further than the
measurement asks. The published rule has no ``s(t)``; each of its 1000 ancestral steps moves by

    x <- x - zeta grad |r|

With ``zeta`` that is what a step of the reverse SDE over a thousandth of the process's time does:
the score then gains ``-zeta 1000/(g^2 t_max) grad |r|``, whatever the number of steps.

Source: Diffusion Posterior Sampling for General Noisy Inverse Problems (Chung et al., 2023),
https://arxiv.org/abs/2209.14687.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .conjugate import dot
from .measured import Denoised, Measured, beside

PUBLISHED = 1000
"""Steps of the published sampler, which its ``zeta`` belongs to."""


@dataclass(frozen=True, eq=False)
class DPS(Measured):
    """A score led by the gradient of the squared residual.

    Args:
        score, operator, y, noise_std, sigma_data: see :class:`.Measured`.
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
            power = self.noise_std**2 + self.operator.norm**2 * beside(at.variance, r)
            return at.spread(self.operator.adjoint(r / power))
        # grad |r| = -J^T A^T r/|r|
        length = dot(r, r).clamp_min(torch.finfo(r.dtype).tiny).sqrt()
        step = self.zeta * PUBLISHED / (self.sde.t_max * at.diffusion**2)
        return at.spread(self.operator.adjoint(beside(step, r) * r / beside(length, r)))
