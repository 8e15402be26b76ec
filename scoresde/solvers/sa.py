r"""SA-Solver: stochastic Adams methods, predictor and corrector, with noise where it helps.

    x_s = (sigma_s/sigma_t) e^(-tau^2 h) x_t
          + (1 + tau^2) sigma_s e^(-tau^2 lam_s) int e^((1 + tau^2) lam) x0_hat d lam
          + sigma_s sqrt(1 - e^(-2 tau^2 h)) z,        lam the log-SNR, h its step

for every ``tau >= 0``: 0 is the probability-flow ODE, 1 the reverse SDE.

Source: SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models (Xue et al.,
2023), https://arxiv.org/abs/2305.14267.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .multistep import Level, Multistep


@dataclass(frozen=True)
class SASolver(Multistep):
    """SA-Solver: ``tau`` between two noise levels, 0 in steps that leave them.

    Args:
        strength: ``tau`` where there is noise.
        q_low: noise level ``sigma/alpha`` below which there is none; the default is that of VP at
            ``t = 0.2``.
        q_high: level above which there is none; that of VP at ``t = 0.8``.
    """

    variable: str = field(default="data", init=False, repr=False)
    points: int = 3
    corrector: int = 4
    coordinate: str = field(default="logsnr", init=False, repr=False)
    line: str = field(default="exact", init=False, repr=False)
    strength: float = 1.0
    q_low: float = 0.72
    q_high: float = 25.0

    stochastic: ClassVar[bool] = True
    name: ClassVar[str] = "sa"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.strength >= 0:
            raise ValueError(f"SASolver needs strength >= 0, got {self.strength}")
        # With noise the values that are extrapolated are rough: more points lower the constant.
        object.__setattr__(self, "order", min(self.order, 2.0))

    def tau(self, here: Level, ahead: Level) -> float:
        """``strength`` if the whole step lies between the two levels."""
        q, q_ahead = (-here.logsnr).exp(), (-ahead.logsnr).exp()
        return self.strength if bool((q_ahead >= self.q_low) & (q <= self.q_high)) else 0.0
