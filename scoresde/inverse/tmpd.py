r"""Tweedie moment projected diffusion: the covariance is taken diagonal, by its row sums.

    v = (sigma^2/alpha) J^T 1,    (noise_std^2 I + A diag(v) A^T) w = r
    score(x_t | y) = score(x_t) + c J^T A^T w,    c = w.r / w.(noise_std^2 I + A V A^T) w

The row sums of ``V = Cov[x_0 | x_t]`` take one product, and are the covariance itself where it is
diagonal. The paper goes on to row sums of ``A V A^T``, in the place of the system; but row sums of
a covariance may be small or negative where it is not, and the guidance then explodes. Here the
system of a diagonal ``V`` is solved, and ``c``, which is 1 where ``V`` is diagonal and costs
nothing, makes the pull as strong as ``V`` itself says it is along ``w``.

Source: Tweedie Moment Projected Diffusions for Inverse Problems (Boys et al., 2023),
https://arxiv.org/abs/2310.06721.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..sde.base import match
from .conjugate import scaled, solved
from .measured import Denoised, Scaled, beside

THINNEST = 1e-4
"""Smallest variance that is believed, as a share of ``r_t^2`` (a covariance's row sums may be
negative): that of data of a hundredth of ``sigma_data``."""


@dataclass(frozen=True, eq=False)
class TMPD(Scaled):
    """A score led by a measurement through the row sums of the covariance.

    Args:
        score, operator, y, noise_std, sigma_data: see :class:`.Scaled`.
        iterations: of conjugate gradients for ``w``, >= 1; they ask nothing of the network.
    """

    iterations: int = 20

    products: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1:
            raise ValueError(f"TMPD needs iterations >= 1, got {self.iterations}")

    def pull(self, at: Denoised, r: Tensor) -> Tensor:
        """``c V^T A^T w``."""
        v = at.spread(torch.ones_like(at.x0))
        v = torch.maximum(v, match(THINNEST * at.variance, v))
        b = beside(at.variance, r)
        w, _ = solved(self.operator, v.mul, r, self.noise_std**2, b, self.iterations)
        return scaled(self.operator, at.spread, w, r, self.noise_std**2)
