r"""PNDM: Adams-Bashforth with constant weights on the noise, each step by DDIM's transfer.

    eps' = (55 eps_i - 59 eps_{i-1} + 37 eps_{i-2} - 9 eps_{i-3})/24
    x_s = (alpha_s/alpha_t) x_t + (sigma_s - alpha_s sigma_t/alpha_t) eps'

The weights suit a quadrature in the grid's own variable, but the transfer is DDIM's, exact for
constant noise alone: order 2 on equal steps in log-SNR, however many values are combined, which
:class:`~.linear.DEIS` and :class:`~.linear.LMS` mend. The first steps combine fewer (iPNDM), so
that each costs one evaluation.

Source: Pseudo Numerical Methods for Diffusion Models on Manifolds (Liu et al., 2022),
https://arxiv.org/abs/2202.09778; the start of lower orders: Fast Sampling of Diffusion Models with
Exponential Integrator (Zhang & Chen, 2023), https://arxiv.org/abs/2204.13902.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..noise import NoiseSource
from ..sde.base import Reverse, match
from .base import Solver

WEIGHTS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Adams-Bashforth of orders 1 to 4, newest value first."""


@dataclass(frozen=True)
class PNDM(Solver):
    """Pseudo linear multistep method, of order 2 at most.

    Args:
        points: values of the noise that are combined, 1 to 4.
    """

    points: int = 4

    order: ClassVar[float] = 2.0
    stochastic: ClassVar[bool] = False
    default_steps: ClassVar[int | None] = 50

    def __post_init__(self) -> None:
        if not 1 <= self.points <= 4:
            raise ValueError(f"PNDM takes 1 to 4 points, got {self.points}")
        object.__setattr__(self, "order", float(min(self.points, 2)))

    def init(
        self, reverse: Reverse, x: Tensor, times: Tensor, noise: NoiseSource | None
    ) -> tuple[Tensor, ...]:
        """No values yet."""
        return ()

    def step(
        self,
        reverse: Reverse,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource | None,
        state: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One evaluation, the combination, and DDIM's transfer."""
        values = (reverse.noise(x, t), *(state or ()))[: self.points]
        weights = WEIGHTS[len(values) - 1]
        eps = sum(
            (w * v for w, v in zip(weights[1:], values[1:], strict=True)), weights[0] * values[0]
        )
        ratio = reverse.sde.alpha(s) / reverse.sde.alpha(t)
        span = reverse.sde.sigma(s) - ratio * reverse.sde.sigma(t)
        return match(ratio, x) * x + match(span, x) * eps, values
