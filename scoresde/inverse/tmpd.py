r"""Tweedie moment projected diffusion: the covariance is taken diagonal, by its row sums.

    v = (sigma^2/alpha) J^T 1,    (noise_std^2 I + A diag(v) A^T) w = r
    score(x_t | y) = score(x_t) + J^T A^T w

The row sums of ``V = Cov[x_0 | x_t]`` take one product, and are the covariance itself where it is
diagonal.

Source: Tweedie Moment Projected Diffusions for Inverse Problems (Boys et al., 2023),
https://arxiv.org/abs/2310.06721.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .conjugate import solved
from .measured import Denoised, Measured, beside


@dataclass(frozen=True, eq=False)
class TMPD(Measured):
    """A score led by a measurement through the row sums of the covariance.

    Args:
        score, operator, y, noise_std, sigma_data: see :class:`.Measured`.
        iterations: of conjugate gradients for ``w``, >= 1; they ask nothing of the network.
    """

    iterations: int = 20

    products: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1:
            raise ValueError(f"TMPD needs iterations >= 1, got {self.iterations}")

    def pull(self, at: Denoised, r: Tensor) -> Tensor:
        """``V^T A^T w``."""
        v = at.spread(torch.ones_like(at.x0)).clamp_min(0)
        b = beside(at.variance, r)
        w, _ = solved(self.operator, v.mul, r, self.noise_std**2, b, self.iterations)
        return at.spread(self.operator.adjoint(w))
