r"""Time grids: where a solver steps, apart from how.

A grid gives ``steps + 1`` decreasing times from ``t_start`` to ``t_end``, in float64 on the CPU.
Solvers take their step from neighbouring times, so any grid serves any solver.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .config import ConfigError, build
from .sde.base import GaussianSDE


@dataclass(frozen=True)
class Grid(ABC):
    """Rule that places the times: equal steps in some function of time."""

    for_few_steps: ClassVar[bool] = False
    """Whether the rule spends its steps where trained networks need them."""

    def __call__(self, sde: GaussianSDE, steps: int, t_start: float, t_end: float) -> Tensor:
        """``steps + 1`` times from ``t_start`` down to ``t_end``.

        Raises:
            ValueError: if ``steps < 1``, if not ``0 <= t_end < t_start <= t_max``, or if the rule
                needs a log-SNR that is infinite there (``sigma = 0``).
        """
        if steps < 1:
            raise ValueError(f"a grid needs steps >= 1, got {steps}")
        if not 0 <= t_end < t_start <= sde.t_max:
            raise ValueError(
                f"a grid needs 0 <= t_end < t_start <= {sde.t_max}, "
                f"got t_start={t_start}, t_end={t_end}"
            )
        times = self.place(
            sde, torch.linspace(0, 1, steps + 1, dtype=torch.float64), t_start, t_end
        )
        times[0], times[-1] = t_start, t_end
        if not bool((times.diff() < 0).all()):  # false for nan, too
            raise ValueError(
                f"{type(self).__name__} cannot place {steps} decreasing steps from t={t_start} "
                f"to t={t_end}: too many, or no finite log-SNR at an end"
            )
        return times

    @abstractmethod
    def place(self, sde: GaussianSDE, u: Tensor, t_start: float, t_end: float) -> Tensor:
        """Times at the fractions ``u`` in [0, 1] of the way."""


@dataclass(frozen=True)
class Uniform(Grid):
    """Equal steps in ``t``."""

    def place(self, sde: GaussianSDE, u: Tensor, t_start: float, t_end: float) -> Tensor:
        """``t_start + u (t_end - t_start)``."""
        return t_start + u * (t_end - t_start)


@dataclass(frozen=True)
class Quadratic(Grid):
    """Equal steps in ``sqrt(t)``."""

    def place(self, sde: GaussianSDE, u: Tensor, t_start: float, t_end: float) -> Tensor:
        """``(sqrt(t_start) + u (sqrt(t_end) - sqrt(t_start)))^2``."""
        return (t_start**0.5 + u * (t_end**0.5 - t_start**0.5)) ** 2


@dataclass(frozen=True)
class LogSNR(Grid):
    """Equal steps in the log-SNR, the natural time of exponential integrators."""

    name: ClassVar[str] = "logsnr"

    def place(self, sde: GaussianSDE, u: Tensor, t_start: float, t_end: float) -> Tensor:
        """``time(log_snr_start + u (log_snr_end - log_snr_start))``."""
        start, end = sde.log_snr(t_start), sde.log_snr(t_end)
        return sde.time(start + u * (end - start))


@dataclass(frozen=True)
class Karras(Grid):
    """Equal steps in ``q^(1/rho)`` with ``q = sigma/alpha``: shorter steps at less noise.

    Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al.,
    2022), equation 5, https://arxiv.org/abs/2206.00364.

    Args:
        rho: exponent, > 0; 1 is uniform in ``q``, large values approach :class:`LogSNR`.
    """

    rho: float = 7.0

    for_few_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.rho > 0:
            raise ValueError(f"Karras grid needs rho > 0, got {self.rho}")

    def place(self, sde: GaussianSDE, u: Tensor, t_start: float, t_end: float) -> Tensor:
        """``time(-log q)`` of the interpolated ``q``."""
        start = (-sde.log_snr(t_start) / self.rho).exp()
        end = (-sde.log_snr(t_end) / self.rho).exp()
        return sde.time(-self.rho * (start + u * (end - start)).log())


@dataclass(frozen=True)
class Logistic(Grid):
    """Equal steps in the logistic function ``1/(1 + (q/scale)^(-2/width))`` of the noise level.

    The steps are shortest where signal and noise are alike, ``q = sigma/alpha`` about ``scale``:
    there a trajectory decides between the modes of the data, and bends. ``width=1`` is uniform in
    the noise's share of a variance-preserving state, ``width=2`` in the time of the linear path,
    and large widths approach :class:`LogSNR`.

    Args:
        width: of the logistic function in ``log q``, > 0.
        scale: noise level of the shortest steps, > 0; in units of the data's standard deviation.
    """

    width: float = 3.0
    scale: float = 1.0

    for_few_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.width > 0 and self.scale > 0):
            raise ValueError(
                f"Logistic grid needs width > 0 and scale > 0, "
                f"got width={self.width}, scale={self.scale}"
            )

    def place(self, sde: GaussianSDE, u: Tensor, t_start: float, t_end: float) -> Tensor:
        """``time(-log q)`` with ``log(q/scale) = width atanh(v)`` and ``v`` interpolated."""
        centre = math.log(self.scale)
        start, end = (
            torch.tanh((-sde.log_snr(t) - centre) / self.width) for t in (t_start, t_end)
        )
        return sde.time(-(centre + self.width * torch.atanh(start + u * (end - start))))


@dataclass(frozen=True)
class Tuned(Grid):
    """Points placed by :func:`scoresde.tune` for one score, solver and number of steps.

    Args:
        log_snr: increasing log-SNR of the points. Without any, the grid stands for the points
            that were saved for the solver and step count at hand, with the model or in ``file``.
        file: file of saved points; that of the model if None.
    """

    log_snr: tuple[float, ...] = ()
    file: str | None = None

    for_few_steps: ClassVar[bool] = True

    def place(self, sde: GaussianSDE, u: Tensor, t_start: float, t_end: float) -> Tensor:
        """The points, if they are as many and between the same times."""
        if len(u) != len(self.log_snr):
            raise ValueError(
                f"this grid was tuned for {max(len(self.log_snr) - 1, 0)} steps, not {len(u) - 1}"
            )
        times = sde.time(torch.tensor(self.log_snr, dtype=torch.float64))
        for name, given, own in (("t_start", t_start, times[0]), ("t_end", t_end, times[-1])):
            if not math.isclose(given, float(own), rel_tol=1e-6):
                raise ValueError(f"this grid was tuned for {name}={float(own):g}, not {given:g}")
        return times


def grid_of(section: Any) -> Grid:
    """The grid that a name, a section or the path of a file of tuned grids describes.

    Raises:
        ConfigError: for an unknown one, or what is no grid.
    """
    name = section.get("name") if isinstance(section, Mapping) else section
    if isinstance(name, str) and name.endswith((".yaml", ".yml")):
        return Tuned(file=name)
    found = build(section, sys.modules[__name__], "grid")
    if not isinstance(found, Grid):
        raise ConfigError(f"grid must be a name, a section or a Grid, got {found!r}")
    return found


__all__ = ["Grid", "Karras", "LogSNR", "Logistic", "Quadratic", "Tuned", "Uniform"]
