r"""DPM-Solver and DPM-Solver++: exponential integrators in the log-SNR ``lam``, ``h`` its step.

    DPM-Solver (noise):    x_s = (alpha_s/alpha_t) x_t - alpha_s int e^-lam eps_hat d lam
    DPM-Solver++ (data):   x_s = (sigma_s/sigma_t) x_t + sigma_s int e^lam x0_hat d lam
    SDE-DPM-Solver++:      x_s = (sigma_s/sigma_t) e^-h x_t + alpha_s int 2 e^(2 (lam - lam_s))
                                 x0_hat d lam + sigma_s sqrt(1 - e^(-2h)) z

Multistep methods (M) take earlier values into the polynomial, singlestep ones (S) evaluate at
points between.

Sources: DPM-Solver (Lu et al., 2022), https://arxiv.org/abs/2206.00927; DPM-Solver++ (Lu et al.,
2022), https://arxiv.org/abs/2211.01095.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ..config import unknown
from ..noise import NoiseSource
from ..sde.base import Reverse
from .base import Solver
from .multistep import Level, Multistep, level, quadrature

FORMS = ("exact", "published")


@dataclass(frozen=True)
class DPMpp2M(Multistep):
    """DPM-Solver++(2M): a line through two denoised states, published with ``line="bh2"``."""

    variable: str = field(default="data", init=False, repr=False)
    points: int = field(default=2, init=False, repr=False)
    corrector: int = field(default=0, init=False, repr=False)
    coordinate: str = field(default="logsnr", init=False, repr=False)
    line: str = "bh2"

    name: ClassVar[str] = "dpmpp-2m"


@dataclass(frozen=True)
class SDEDPMpp2M(DPMpp2M):
    """SDE-DPM-Solver++(2M), for the reverse SDE; ``points=1`` is SDE-DPM-Solver++(1).

    Of weak order ``points``, measured on Gaussian data without Monte Carlo.
    """

    points: int = 2

    stochastic: ClassVar[bool] = True
    name: ClassVar[str] = "sde-dpmpp-2m"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.points > 2:
            raise ValueError(f"SDEDPMpp2M takes 1 or 2 points, got {self.points}")

    def tau(self, here: Level, ahead: Level) -> float:
        """1: all of the reverse SDE's noise."""
        return 1.0


@dataclass(frozen=True)
class DPMpp3M(DPMpp2M):
    """DPM-Solver++(3M): a parabola through three denoised states, of order 3.

    Args:
        form: ``"exact"``; ``"published"`` takes half of the parabola's curvature, as the code of
            the authors and its descendants do: they put the second divided difference in the
            place of the second derivative, which leaves order 2.
    """

    points: int = field(default=3, init=False, repr=False)
    line: str = field(default="exact", init=False, repr=False)
    form: str = "exact"

    name: ClassVar[str] = "dpmpp-3m"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise unknown("form", self.form, FORMS)
        super().__post_init__()
        if self.form == "published":
            object.__setattr__(self, "line", "bh2")  # of its second step, which has two values
            object.__setattr__(self, "order", 2.0)

    def weights(
        self, levels: tuple[Level, ...], start: Level, end: Level, sde: Any, tau: float = 0.0
    ) -> list[Tensor]:
        """As :meth:`Multistep.weights`, halfway to those of the tangent in the published form."""
        exact = super().weights(levels, start, end, sde, tau)
        if self.form == "exact" or len(levels) < 3:
            return exact
        at, mass = quadrature(self.variable, start, end, tau)
        whole, moment = mass.sum(), (mass * (at - start.logsnr)).sum()
        a, b, c = (item.logsnr for item in levels)
        # The slope at a of the parabola through the three values: weights of a, b and c.
        slope_a = 1 / (a - b) + 1 / (a - c)
        slope_b, slope_c = (a - c) / ((b - a) * (b - c)), (a - b) / ((c - a) * (c - b))
        tangent = [whole + moment * slope_a, moment * slope_b, moment * slope_c]
        return [(e + line) / 2 for e, line in zip(exact, tangent, strict=True)]


@dataclass(frozen=True)
class Singlestep(Solver):
    """Methods that evaluate at points within the step; each passes a line through two values."""

    variable: ClassVar[str] = "noise"
    fractions: ClassVar[tuple[float, ...]] = ()
    """Where the step is evaluated besides its start, in log-SNR."""
    line: ClassVar[str] = "exact"
    """How lines are weighed."""

    stochastic: ClassVar[bool] = False
    default_steps: ClassVar[int | None] = 10

    def step(
        self,
        reverse: Reverse,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource | None,
        state: Any = None,
    ) -> tuple[Tensor, Any]:
        """From ``t`` to each point between, and from ``t`` to ``s`` by the last of them."""
        sde, rule = reverse.sde, Multistep(self.variable, points=2, line=self.line)
        start, end = level(sde, t), level(sde, s)
        span = end.logsnr - start.logsnr
        levels: tuple[Level, ...] = (start,)
        values: tuple[Tensor, ...] = (rule.value(reverse, x, start),)
        targets = [level(sde, sde.time(start.logsnr + r * span)) for r in self.fractions]
        for target in (*targets, end):
            moved = rule.move(x, levels, values, start, target, 2, reverse)
            if target is not end:
                levels, values = (target, start), (rule.value(reverse, moved, target), values[-1])
        return moved, state


@dataclass(frozen=True)
class DPM2S(Singlestep):
    """DPM-Solver-2: the noise at the middle of the step in log-SNR; two evaluations a step."""

    order: ClassVar[float] = 2.0
    nfe_per_step: ClassVar[int] = 2
    fractions: ClassVar[tuple[float, ...]] = (1 / 2,)
    line: ClassVar[str] = "bh2"
    name: ClassVar[str] = "dpm-2s"


@dataclass(frozen=True)
class DPM3S(Singlestep):
    """DPM-Solver-3: the noise at one and at two thirds; three evaluations a step."""

    order: ClassVar[float] = 3.0
    nfe_per_step: ClassVar[int] = 3
    fractions: ClassVar[tuple[float, ...]] = (1 / 3, 2 / 3)
    name: ClassVar[str] = "dpm-3s"


@dataclass(frozen=True)
class DPMpp2S(DPM2S):
    """DPM-Solver++(2S): the denoised state at the middle of the step."""

    variable: ClassVar[str] = "data"
    name: ClassVar[str] = "dpmpp-2s"
