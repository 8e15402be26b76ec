r"""Euler-Maruyama: the reversed process with its coefficients frozen for one step.

    x_s = x + (s - t) drift(x, t) + diffusion(t) sqrt(t - s) z,    z ~ N(0, I)

It asks nothing of the process but drift and diffusion. Both may be large near ``t_max`` (for the
straight path they diverge at ``t = 1``) and near ``t_min``, so its default grid is uniform in the
log-SNR, where each step changes the state by a bounded factor.

Source: Numerical Solution of Stochastic Differential Equations (Kloeden & Platen, 1992),
https://doi.org/10.1007/978-3-662-12616-5.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ..noise import NoiseSource
from ..sde.base import Reverse, match
from .base import Solver, increment


@dataclass(frozen=True)
class EulerMaruyama(Solver):
    """Euler-Maruyama steps of the reverse SDE, or Euler steps of the ODE.

    Args:
        eta: member of the reverse family, >= 0: 1 the reverse SDE, 0 the probability-flow ODE.
    """

    eta: float = 1.0

    order: ClassVar[float] = 1.0
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.eta >= 0:
            raise ValueError(f"EulerMaruyama needs eta >= 0, got {self.eta}")
        object.__setattr__(self, "stochastic", self.eta > 0)

    def step(
        self,
        reverse: Reverse,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource | None,
        state: Any = None,
    ) -> tuple[Tensor, Any]:
        """``x + (s - t) drift(x, t) + diffusion(t) sqrt(t - s) z``."""
        x = x + match(s - t, x) * reverse.drift(x, t)
        if self.stochastic:
            z = increment(x, noise, reverse.sde, t, s)
            x = x + match(reverse.diffusion(t) * (t - s).sqrt(), x) * z
        return x, state


@dataclass(frozen=True)
class Euler(EulerMaruyama):
    """Euler steps of the probability-flow ODE: :class:`EulerMaruyama` with ``eta=0``."""

    eta: float = field(default=0.0, init=False, repr=False)
