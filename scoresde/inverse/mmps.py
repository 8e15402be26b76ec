r"""Moment-matching posterior sampling: the covariance is the score's own.

    (noise_std^2 I + A V A^T) w = r,    x0' = x0_hat + V A^T w,    V = (sigma^2/alpha) J^T

Products with ``V`` are vector-Jacobian products, so the system is solved by conjugate gradients,
preconditioned by the covariance ``noise_std^2 I + r_t^2 A A^T`` of data ``N(0, sigma_data^2 I)``.
For Gaussian data it is exact once the iterations reach the number of distinct eigenvalues of the
preconditioned system. One iteration goes in PGDM's direction, as far as the score's own covariance
says; further ones cost a product each, and pay where data are correlated and many numbers are
measured.

Source: Learning Diffusion Priors from Observations by Expectation Maximization (Rozet et al.,
2024), https://arxiv.org/abs/2405.13712.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .conjugate import solved
from .measured import Denoised, Scaled, beside


@dataclass(frozen=True, eq=False)
class MMPS(Scaled):
    """A score led by a measurement through the covariance of ``p(x_0 | x_t)``.

    Args:
        score, operator, y, noise_std, sigma_data: see :class:`.Scaled`.
        iterations: of conjugate gradients, >= 1; each costs one product.
    """

    iterations: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1:
            raise ValueError(f"MMPS needs iterations >= 1, got {self.iterations}")

    @property
    def products(self) -> int:  # type: ignore[override]
        """One an iteration: what they sum up to needs none."""
        return self.iterations

    def pull(self, at: Denoised, r: Tensor) -> Tensor:
        """``V A^T w`` by conjugate gradients."""
        b = beside(at.variance, r)
        return solved(self.operator, at.spread, r, self.noise_std**2, b, self.iterations)[1]
