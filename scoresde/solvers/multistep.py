r"""Linear multistep methods: all of the field's are one quadrature.

In the right variables the probability-flow ODE has no linear part left, ``du = V d kappa``:

    V          u                          kappa                      V is
    noise      x / alpha                  q = sigma/alpha            eps_hat
    data       x / sigma                  1/q                        E[x_0 | x_t]
    velocity   x / sqrt(alpha^2+sigma^2)  atan q                     alpha eps - sigma x_0, normed

With ``m = x/u``, a step from ``t`` to ``s`` integrates the polynomial through the last values of
``V``, taken in some coordinate ``c`` (log-SNR, kappa itself, or t):

    x_s = (m_s/m_t) x_t + m_s sum_j V_j int_t^s L_j(c) d kappa

Noise in kappa is LMS, noise in t is DEIS, data in log-SNR DPM-Solver++ and UniPC, velocity in
kappa vAB. A corrector adds the value at ``s``, evaluated anyway for the step after, and integrates
anew. ``tau > 0`` follows the reverse SDE with ``tau^2`` times its noise (data alone): then
``kappa = e^((1 + tau^2) log_snr)``, ``m = sigma e^(-tau^2 log_snr)``, and noise is added.

Sources: DPM-Solver++ (Lu et al., 2022), https://arxiv.org/abs/2211.01095; UniPC (Zhao et al.,
2023), https://arxiv.org/abs/2302.04867; SA-Solver (Xue et al., 2023),
https://arxiv.org/abs/2305.14267.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import unknown
from ..noise import NoiseSource
from ..sde.base import Reverse
from .base import Solver, increment

VARIABLES = ("noise", "data", "velocity")
COORDINATES = ("logsnr", "kappa", "t")
LINES = ("exact", "bh1", "bh2")


class Level(NamedTuple):
    """A time of the grid and what the process is there; float64 scalars on the CPU."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    logsnr: Tensor


@dataclass(frozen=True)
class History:
    """What a multistep method carries: the last values, newest first, and where they were."""

    levels: tuple[Level, ...] = ()
    values: tuple[Tensor, ...] = ()
    before: Tensor | None = None
    """The state one step back, from which the corrector starts again."""
    tau: float = 0.0
    """Share of the noise in the step before."""
    kick: Tensor | None = None
    """The noise that was added since."""
    left: int | None = None
    """Steps of the grid that are still to be taken."""
    steps: int | None = None
    """Steps of the grid in all."""
    ahead: Level | None = None
    """Where the step before has led to: most often where this one starts."""


@dataclass(frozen=True)
class Multistep(Solver):
    """Multistep method of any variable, coordinate and order.

    Args:
        variable: what is extrapolated, ``"noise"``, ``"data"`` or ``"velocity"``.
        points: values that the prediction passes through, 1 to 6: its order. It starts with one.
        corrector: values of the correction, the newest included, 0 (none) or 2 to 7.
        coordinate: of the polynomial, ``"logsnr"``, ``"kappa"`` or ``"t"``.
        line: how a line through two values is weighed, ``"exact"``, or ``"bh1"`` or ``"bh2"`` as
            published (see :func:`secant`). More values leave nothing to choose.
        lower_last: whether the last steps are taken with fewer points, the last with one.
    """

    variable: str = "data"
    points: int = 2
    corrector: int = 0
    coordinate: str = "logsnr"
    line: str = "exact"
    lower_last: bool = False

    stochastic: ClassVar[bool] = False
    nfe_per_step: ClassVar[int] = 1
    default_steps: ClassVar[int | None] = 20
    fewest: ClassVar[int] = 1
    """Least number of ``points``."""

    def __post_init__(self) -> None:
        if self.variable not in VARIABLES:
            raise unknown("variable", self.variable, VARIABLES)
        if self.coordinate not in COORDINATES:
            raise unknown("coordinate", self.coordinate, COORDINATES)
        if self.line not in LINES:
            raise unknown("line", self.line, LINES)
        name = type(self).__name__
        if not self.fewest <= self.points <= 6:
            raise ValueError(f"{name} takes {self.fewest} to 6 points, got {self.points}")
        if self.corrector and not 2 <= self.corrector <= 7:
            raise ValueError(f"{name} takes a corrector of 0 or 2 to 7, got {self.corrector}")
        object.__setattr__(self, "order", float(max(self.points, self.corrector)))

    def tau(self, here: Level, ahead: Level) -> float:
        """Square root of the share of the reverse SDE's noise in the step, for ``data`` alone."""
        return 0.0

    def init(
        self, reverse: Reverse, x: Tensor, times: Tensor, noise: NoiseSource | None
    ) -> History:
        """Nothing is known yet but the number of steps."""
        return History(left=len(times) - 1, steps=len(times) - 1)

    def reach(self, steps: int | None) -> tuple[int, int]:
        """Values of the prediction and of the correction, on a grid of so many steps."""
        return self.points, self.corrector

    def step(
        self,
        reverse: Reverse,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource | None,
        state: History | None = None,
    ) -> tuple[Tensor, History]:
        """One evaluation at ``t``, the correction of ``x`` by it, and the prediction at ``s``."""
        past = state or History()
        here, ahead = past.ahead, level(reverse.sde, s)
        if here is None or here.t is not t:  # known from the step before, within a run
            here = level(reverse.sde, t)
        levels = (here, *past.levels)
        values = (self.value(reverse, x, here), *past.values)
        points, corrector = self.reach(past.steps)
        keep, left = max(points, corrector) - 1, past.left
        if corrector and past.before is not None:
            x = self.move(
                past.before, levels, values, levels[1], here, corrector, reverse, past.tau
            )
            x = x if past.kick is None else x + past.kick
        if left is not None:
            points, left = min(points, left) if self.lower_last else points, left - 1
        tau, kick = self.tau(here, ahead), None
        predicted = self.move(x, levels, values, here, ahead, points, reverse, tau)
        if tau:
            gap = -torch.expm1(2 * tau**2 * (here.logsnr - ahead.logsnr))
            kick = ahead.sigma * gap.sqrt() * increment(x, noise, reverse.sde, t, s)
            predicted = predicted + kick
        return predicted, History(
            levels[:keep], values[:keep], x, tau, kick, left, past.steps, ahead
        )

    def shifted(self, state: History | None, change: Tensor) -> History | None:
        """The change is kept by the correction, which starts again from the state before."""
        if state is None or not self.corrector or state.before is None:
            return state
        return replace(state, kick=change if state.kick is None else state.kick + change)

    def value(self, reverse: Reverse, x: Tensor, here: Level) -> Tensor:
        """``V``, one evaluation."""
        if self.variable == "data":
            return reverse.denoise(x, here.t)
        eps = reverse.noise(x, here.t)
        if self.variable == "noise":
            return eps
        size = torch.hypot(here.alpha, here.sigma)
        return size / here.alpha * eps - here.sigma / (here.alpha * size) * x

    def move(
        self,
        x: Tensor,
        levels: tuple[Level, ...],
        values: tuple[Tensor, ...],
        start: Level,
        end: Level,
        points: int,
        reverse: Reverse,
        tau: float = 0.0,
    ) -> Tensor:
        """``x`` taken from ``start`` to ``end`` by the polynomial through the first values."""
        levels, values = levels[:points], values[:points]
        weights = self.weights(levels, start, end, reverse.sde, tau)
        x = ratio(self.variable, start, end, tau) * x
        for weight, value in zip(weights, values, strict=True):
            x = x + weight * value
        return x

    def weights(
        self, levels: tuple[Level, ...], start: Level, end: Level, sde: Any, tau: float = 0.0
    ) -> list[Tensor]:
        """``m_s int L_j d kappa`` of each value, float64 scalars."""
        if self.line != "exact" and len(levels) == 2:
            return secant(self.variable, levels, start, end, tau, self.line)
        at, mass = quadrature(self.variable, start, end, tau)
        place = torch.stack([self.place(item.logsnr, item.t) for item in levels])
        t = sde.time(at) if self.coordinate == "t" else at
        return list(lagrange(place, self.place(at, t)) @ mass)

    def place(self, logsnr: Tensor, t: Tensor) -> Tensor:
        """The coordinate of the polynomial."""
        if self.coordinate == "logsnr":
            return logsnr
        return t if self.coordinate == "t" else self.kappa(logsnr)

    def kappa(self, logsnr: Tensor) -> Tensor:
        """The clock of the variable, without noise."""
        return {
            "noise": torch.exp(-logsnr),
            "data": torch.exp(logsnr),
            "velocity": torch.atan(torch.exp(-logsnr)),
        }[self.variable]


def level(sde: Any, t: Tensor) -> Level:
    """The process at a time of the grid, which is the same for every sample.

    Raises:
        ValueError: for a time a sample.
    """
    if t.ndim:
        raise ValueError("exponential integrators take one time for the batch, not one a sample")
    t = t.cpu().double()
    return Level(t, sde.alpha(t), sde.sigma(t), sde.log_snr(t))


def ratio(variable: str, start: Level, end: Level, tau: float = 0.0) -> Tensor:
    """``m_s / m_t``."""
    if variable == "noise":
        return end.alpha / start.alpha
    if variable == "velocity":
        return torch.hypot(end.alpha, end.sigma) / torch.hypot(start.alpha, start.sigma)
    return end.sigma / start.sigma * torch.exp(-(tau**2) * (end.logsnr - start.logsnr))


def density(variable: str, logsnr: Tensor, end: Level, tau: float = 0.0) -> Tensor:
    """``m_s d kappa / d log_snr``."""
    if variable == "noise":
        return -end.alpha * torch.exp(-logsnr)
    if variable == "velocity":
        return -torch.hypot(end.alpha, end.sigma) / (torch.exp(logsnr) + torch.exp(-logsnr))
    rate = 1 + tau**2
    return end.alpha * rate * torch.exp(rate * (logsnr - end.logsnr))


def quadrature(variable: str, start: Level, end: Level, tau: float = 0.0) -> tuple[Tensor, Tensor]:
    """Nodes in log-SNR from ``start`` to ``end``, and the weights of ``m_s int . d kappa``."""
    nodes, factors = gauss_legendre()
    span = end.logsnr - start.logsnr
    at = start.logsnr + span * nodes
    return at, span * factors * density(variable, at, end, tau)


def secant(
    variable: str,
    levels: tuple[Level, ...],
    start: Level,
    end: Level,
    tau: float,
    line: str,
) -> list[Tensor]:
    """Weights of a line through two values, its slope's as DPM-Solver++ and UniPC publish it.

    The exact ``int (log_snr - log_snr_t) m_s d kappa`` is replaced by ``h B/2``, ``B = int m_s d
    kappa`` (``"bh2"``) or h times the density at the end (``"bh1"``): as exact to second order.
    """
    span = end.logsnr - start.logsnr
    whole = quadrature(variable, start, end, tau)[1].sum()
    size = whole if line == "bh2" else span * density(variable, end.logsnr, end, tau)
    slope = span * size / 2 / (levels[0].logsnr - levels[1].logsnr)
    first = levels[0].t == start.t
    return [whole * first + slope, whole * ~first - slope]


def lagrange(nodes: Tensor, at: Tensor) -> Tensor:
    """``L_j(at) = prod_{k != j} (at - c_k)/(c_j - c_k)``, shape ``(len(nodes), len(at))``."""
    same = torch.eye(len(nodes), dtype=torch.bool)[..., None]
    above = (at - nodes[:, None]).expand(len(nodes), -1, -1)
    below = nodes[:, None, None] - nodes[None, :, None]
    return torch.where(same, 1.0, above / torch.where(same, 1.0, below)).prod(1)


@cache
def gauss_legendre(count: int = 24) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)
