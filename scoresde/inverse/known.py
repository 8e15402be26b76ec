r"""What a measurement says of a state, coefficient by coefficient, and solvers that keep to it.

With ``A = U S V^T`` and ``c = V^T x``, a measurement ``y = A x_0 + noise_std e`` says

    m = c_0 + tau e,    m_i = (U^T y)_i/s_i,    tau_i = noise_std/s_i

so that ``m`` is itself a state of the coefficient: that at the noise level ``q = sigma/alpha =
tau_i``, and so the state at every level above is ``m`` with more noise,

    c_t | y ~ N(alpha m, sigma^2 - alpha^2 tau^2)                          where q >= tau_i

Below ``tau_i`` the state has left ``m`` behind: the reverse process knows all that ``m`` had to
say, and would count it twice if it were told again. A step from above to below must set out from
``m``. What the coefficient does between two states whose levels differ is a Brownian motion in
``q^2``, pinned at its ends. Coefficients that are not measured have ``tau_i`` infinite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import class_name
from ..sde.base import Reverse
from ..solvers.base import Solver
from .operator import Spectrum, check_noise, inverse


class Level(NamedTuple):
    """The process at a time: ``alpha`` and ``sigma`` as float64 scalars on the CPU."""

    alpha: Tensor
    sigma: Tensor

    @classmethod
    def at(cls, sde: Any, t: Tensor) -> Level:
        """The level at a time of the grid, which is the same for every sample."""
        t = t.cpu().double()
        return cls(sde.alpha(t), sde.sigma(t))

    @property
    def power(self) -> Tensor:
        """``q^2``."""
        return (self.sigma / self.alpha) ** 2


@dataclass(frozen=True, eq=False)
class Known:
    """``m`` and ``tau`` of every coefficient.

    Args:
        spectrum: ``A = U S V^T``.
        mean: ``m``, zero where nothing is measured, ``(1 or B, ...)``.
        power: ``tau^2``, infinite where nothing is measured; broadcasts with ``mean``.
    """

    spectrum: Spectrum
    mean: Tensor
    power: Tensor

    @classmethod
    def of(cls, operator: Any, y: Tensor, noise_std: float, x: Tensor) -> Known:
        """What ``y`` says of states like ``x``."""
        spectrum = operator.spectrum(x)
        mean = inverse(spectrum.values) * spectrum.measured(y.to(x.device, x.dtype))
        tau = noise_std * inverse(spectrum.values)
        return cls(spectrum, mean, torch.where(spectrum.values > 0, tau**2, math.inf))

    def start(self, c: Tensor, at: Level, z: Tensor) -> Tensor:
        """A state of the prior that has been told of ``y``.

        Args:
            c: coefficients of the state, ``(B, ...)``.
            at: its level.
            z: standard normals like ``c``.
        """
        return self._fall(c, at, z, 0.0)

    def down(self, before: Tensor, c: Tensor, t: Level, s: Level, z: Tensor) -> Tensor:
        """The state after a step that knew nothing of ``y``, told of it.

        A step from ``t`` to ``s`` that crosses ``tau`` has set out from ``q_t``. What it says of
        ``x_0``, ``(c_s - b c_t)/(1 - r^2)`` with ``r = q_s/q_t``, is kept, and it is taken again
        from ``m``: with ``p = q_s/tau``

            c_s <- (1 - p^2) (c_s - b c_t)/(1 - r^2) + p^2 alpha_s m + noise

        such that the state has the noise of a step of the reverse process.

        Args:
            before: coefficients at ``t``, ``(B, ...)``.
            c: coefficients at ``s``.
            t: level that the step started from.
            s: level that it has reached, below.
            z: standard normals like ``c``.
        """
        r2 = (t.alpha * s.sigma / (s.alpha * t.sigma)) ** 2
        b = t.alpha / s.alpha * (s.sigma / t.sigma) ** 2
        told = self._fall((c - b * before) / (1 - r2), s, z, r2)
        return torch.where(self.power <= t.power, told, c)

    def _fall(self, free: Tensor, s: Level, z: Tensor, r2: Any) -> Tensor:
        """The state at ``s``: ``m`` with more noise, or less where ``s`` is below ``tau``."""
        more = s.sigma**2 - s.alpha**2 * self.power
        p2 = s.power / self.power
        less = ((1 - p2) * (p2 - r2) / (1 - r2)).clamp_min(0).sqrt()
        pinned = (1 - p2) * free + p2 * s.alpha * self.mean + s.sigma * less * z
        return torch.where(more >= 0, s.alpha * self.mean + more.clamp_min(0).sqrt() * z, pinned)

    def up(self, c: Tensor, s: Level, t: Level, z: Tensor) -> Tensor:
        """The state at the higher level ``t``, drawn from ``p(c_t | c_s, y)``.

        Above ``tau`` it is ``m`` with more noise; below, a Brownian motion from ``c_s`` to ``m``:
        with ``k = (q_t^2 - q_s^2)/(tau^2 - q_s^2)``

            c_t = alpha_t (c_s/alpha_s + k (m - c_s/alpha_s) + sqrt((q_t^2 - q_s^2) (1 - k)) z)

        which is the transition of the process where nothing is measured, ``k = 0``.
        """
        more = t.sigma**2 - t.alpha**2 * self.power
        rise = (t.power - s.power) / (self.power - s.power)
        a = t.alpha / s.alpha
        spread = ((t.sigma**2 - (a * s.sigma) ** 2) * (1 - rise)).clamp_min(0).sqrt()
        moved = a * c + rise * (t.alpha * self.mean - a * c) + spread * z
        return torch.where(more >= 0, t.alpha * self.mean + more.clamp_min(0).sqrt() * z, moved)

    def settle(self, c: Tensor, x0: Tensor, at: Level) -> Tensor:
        """Denoised coefficients, of which ``m`` is known with less noise than the state has.

        ``E[c_0 | m] = m + tau^2 score`` by Tweedie at the level ``tau`` of ``m``, with the score
        at ``q``, ``(x0 - c/alpha)/q^2``: exact where ``tau = q`` and where ``tau = 0``, ``m``.

        Args:
            c: coefficients of the state, ``(B, ...)``.
            x0: those of ``E[x_0 | x]``.
            at: the level of the state.
        """
        share = self.power / at.power
        return torch.where(share <= 1, self.mean + share * (x0 - c / at.alpha), x0)


@dataclass(frozen=True, eq=False)
class InverseSolver(Solver):
    """Base of the solvers that sample what could have been measured.

    Args:
        operator: the linear map ``A`` from items to measurements; it must have a spectrum.
        y: the measurement in model range, ``(1, *operator.out)`` or ``(B, *operator.out)``.
        noise_std: standard deviation of the measurement's noise, >= 0.

    Raises:
        ValueError: for a measurement that does not fit, a number out of range, or an operator
            without a spectrum.
    """

    operator: Any = field(metadata={"described": lambda operator: class_name(type(operator))})
    y: Tensor = field(metadata={"described": None}, repr=False)
    noise_std: float = 0.0

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.y, Tensor):
            raise ValueError(f"{name} needs a measurement y, got {type(self.y).__name__}")
        self.operator.measurements(self.y)
        check_noise(self.noise_std, name)
        if self.operator.spectrum(self.y) is None:
            raise ValueError(
                f"{name} needs an operator with a spectrum, which "
                f"{type(self.operator).__name__} has not; MMPS and PGDM need none"
            )

    def known(self, x: Tensor) -> Known:
        """What the measurement says of states like ``x``.

        Raises:
            ValueError: if it is neither one measurement nor one a sample.
        """
        if len(self.y) not in (1, len(x)):
            raise ValueError(
                f"{len(self.y)} measurements do not fit {len(x)} samples: give one or one a sample"
            )
        return Known.of(self.operator, self.y, self.noise_std, x)

    def denoise(self, reverse: Reverse, x: Tensor, t: Tensor) -> Tensor:
        """``E[x_0 | x]``, one evaluation, with what is measured as it is known from ``y``."""
        known = self.known(x)
        to, back = known.spectrum.to, known.spectrum.back
        x0 = to(reverse.denoise(x, t))
        return back(known.settle(to(x), x0, Level.at(reverse.sde, t)))
