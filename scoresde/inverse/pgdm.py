r"""Pseudo-inverse guidance: data seen from a noisy state spread alike in all directions.

    w = (noise_std^2 I + r_t^2 A A^T)^{-1} r,    r_t^2 = s^2 q^2/(s^2 + q^2),    q = sigma/alpha
    score(x_t | y) = score(x_t) + J^T A^T w

``r_t^2`` is the variance of ``p(x_0 | x_t)`` for data ``N(0, s^2 I)``, ``s = sigma_data``: for
those it is exact. Without noise ``w = (A A^T)^+ r / r_t^2``, the pseudo-inverse of the name.

Source: Pseudoinverse-Guided Diffusion Models for Inverse Problems (Song et al., 2023),
https://openreview.net/forum?id=9_gsMA8MRKQ.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .measured import Denoised, Measured, beside


@dataclass(frozen=True, eq=False)
class PGDM(Measured):
    """A score led by a measurement through the pseudo-inverse of the operator.

    Args:
        score, operator, y, noise_std, sigma_data: see :class:`.Measured`.
    """

    def pull(self, at: Denoised, r: Tensor) -> Tensor:
        """``V^T A^T (noise_std^2 I + r_t^2 A A^T)^{-1} r``."""
        w = self.operator.solve(r, self.noise_std**2, beside(at.variance, r))
        return at.spread(self.operator.adjoint(w))
