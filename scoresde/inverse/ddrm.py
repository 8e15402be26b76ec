r"""DDRM: the steps of DDIM, each coefficient of the spectrum in its own way.

With ``u = c/alpha`` at ``q = sigma/alpha``, ``u0 = E[c_0 | x_t]``, and ``m = (U^T y)/s`` known up
to noise of ``tau = noise_std/s`` (see :mod:`.known`), the state at the target's level ``q`` is

    u0 + sqrt(1 - eta^2) q (u_t - u0)/q_t + eta q z              where nothing is measured
    u0 + sqrt(1 - eta^2) q (m - u0)/tau + eta q z                where q < tau
    (1 - eta_b) u0 + eta_b m + sqrt(q^2 - eta_b^2 tau^2) z       where q >= tau

The noise of a step is ``eta q`` however short the step, so that the method suits few steps:
with many, it stays at what denoised data without a memory give.

Source: Denoising Diffusion Restoration Models (Kawar et al., 2022), equations 7 and 8,
https://arxiv.org/abs/2201.11793.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..noise import NoiseSource
from ..sde.base import Reverse
from ..solvers.base import gaussian
from .known import InverseSolver, Known, Level


@dataclass(frozen=True, eq=False)
class DDRM(InverseSolver):
    """DDRM's steps, on any Gaussian process; one evaluation each.

    Args:
        operator: the linear map ``A`` from items to measurements; it must have a spectrum.
        y: the measurement in model range, ``(1, *operator.out)`` or ``(B, *operator.out)``.
        noise_std: standard deviation of the measurement's noise, >= 0.
        eta: share of new noise where little or nothing is measured, in [0, 1].
        eta_b: share of the measurement where it is better than the state, in [0, 1].

    Raises:
        ValueError: for a measurement that does not fit, a number out of range, or an operator
            without a spectrum.
    """

    eta: float = 0.85
    eta_b: float = 1.0

    name: ClassVar[str] = "ddrm"
    order: ClassVar[float] = 1.0
    stochastic: ClassVar[bool] = True
    default_steps: ClassVar[int | None] = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.eta <= 1 and 0 <= self.eta_b <= 1):
            raise ValueError(
                f"DDRM needs eta and eta_b in [0, 1], got eta={self.eta}, eta_b={self.eta_b}"
            )

    def init(
        self, reverse: Reverse, x: Tensor, times: Tensor, noise: NoiseSource | None
    ) -> tuple[Known, bool]:
        """What is known, and whether the state has been told of it."""
        return self.known(x), False

    def step(
        self,
        reverse: Reverse,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource | None,
        state: tuple[Known, bool] | None = None,
    ) -> tuple[Tensor, tuple[Known, bool]]:
        """One evaluation, and the three cases."""
        known, started = state or (self.known(x), True)
        at, to = Level.at(reverse.sde, t), Level.at(reverse.sde, s)
        c = known.spectrum.to(x)
        if not started:
            c = known.start(c, at, gaussian(c, noise))
            x = known.spectrum.back(c)
        u0 = known.spectrum.to(reverse.denoise(x, t))
        z, tau, q = gaussian(c, noise), known.power.sqrt(), to.sigma / to.alpha
        keep = (1 - self.eta**2) ** 0.5 * q
        free = u0 + keep * (c - at.alpha * u0) / at.sigma + self.eta * q * z
        below = u0 + keep * (known.mean - u0) / tau + self.eta * q * z
        left = (q**2 - self.eta_b**2 * known.power).clamp_min(0).sqrt()
        above = (1 - self.eta_b) * u0 + self.eta_b * known.mean + left * z
        u = torch.where(q >= tau, above, torch.where(tau.isinf(), free, below))
        return known.spectrum.back(to.alpha * u), (known, True)
