r"""Adams methods in the two variables whose ODE is already linear in its clock.

    LMS:  d(x/alpha)/dq = eps_hat,    q = sigma/alpha
    VAB:  dz/dth = v,                 z = x/sqrt(alpha^2 + sigma^2),  th = atan q

Sources: Score-Based Generative Modeling through Stochastic Differential Equations (Song et al.,
2021), https://arxiv.org/abs/2011.13456, for the ODE; Progressive Distillation for Fast Sampling of
Diffusion Models (Salimans & Ho, 2022), https://arxiv.org/abs/2202.00512, for ``v``.
"""

from __future__ import annotations

import math
from bisect import bisect
from dataclasses import dataclass, field
from typing import ClassVar

from .multistep import Multistep


@dataclass(frozen=True)
class LMS(Multistep):
    """Linear multistep method for the noise in ``q = sigma/alpha``, of order ``points``."""

    variable: str = field(default="noise", init=False, repr=False)
    points: int = 4
    corrector: int = field(default=0, init=False, repr=False)
    coordinate: str = field(default="kappa", init=False, repr=False)
    line: str = field(default="exact", init=False, repr=False)


@dataclass(frozen=True)
class VAB(Multistep):
    """Adams-Bashforth method for the velocity in the angle, of order ``points``."""

    variable: str = field(default="velocity", init=False, repr=False)
    points: int = 3
    corrector: int = field(default=0, init=False, repr=False)
    coordinate: str = field(default="kappa", init=False, repr=False)
    line: str = field(default="exact", init=False, repr=False)

    default_grid: ClassVar[str | None] = "logistic"


@dataclass(frozen=True)
class VABM(Multistep):
    """Adams-Bashforth-Moulton method for the velocity in the angle, of order ``points + 1``.

    The prediction of :class:`VAB`, corrected by the evaluation that the next step needs anyway.
    Of all variables the velocity is the smoothest along a trajectory: with few evaluations this
    method, on the logistic grid, has the smallest error of all here (see benchmarks/RESULTS.md).

    Args:
        points: values that the prediction passes through, 1 to 6; 0 for as many as the steps of
            the grid bear: 1 if there are fewer than 6, 2 if fewer than 10, otherwise 3. Long
            steps part from a polynomial that looks back over many of them.
    """

    variable: str = field(default="velocity", init=False, repr=False)
    points: int = 0
    corrector: int = field(default=4, init=False, repr=False)
    coordinate: str = field(default="kappa", init=False, repr=False)
    line: str = field(default="exact", init=False, repr=False)

    default_grid: ClassVar[str | None] = "logistic"
    fewest: ClassVar[int] = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "corrector", (self.points or 3) + 1)
        super().__post_init__()

    def reach(self, steps: int | None) -> tuple[int, int]:
        """``points``, or what the number of steps bears, and one more for the correction."""
        points = self.points or bisect([6, 10], math.inf if steps is None else steps) + 1
        return points, points + 1


@dataclass(frozen=True)
class DEIS(Multistep):
    """tAB-DEIS: the noise as a polynomial in ``t``, exactly integrated; order ``points``.

    ``coordinate="kappa"`` is rhoAB-DEIS.

    Source: Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023),
    https://arxiv.org/abs/2204.13902.
    """

    variable: str = field(default="noise", init=False, repr=False)
    points: int = 4
    corrector: int = field(default=0, init=False, repr=False)
    coordinate: str = "t"
    line: str = field(default="exact", init=False, repr=False)
