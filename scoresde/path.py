r"""The probability-flow ODE in the coordinates in which every Gaussian process is the same.

With ``q = sigma/alpha`` and ``z = x / sqrt(alpha^2 + sigma^2)`` the state keeps its variance and
every process is ``z = cos(th) x_0 + sin(th) eps``, ``th = atan q``. Its ODE is the ``v`` of
Salimans & Ho (2022, https://arxiv.org/abs/2202.00512), with ``eps = -sigma score``:

    dx/dt = f(x, t) - g(t)^2/2 score(x, t)    <=>    dz/dth = (eps - sin(th) z) / cos(th)
    div dz/dth = (div eps - D sin(th)) / cos(th)

No ``1/sigma``, ``1/alpha`` or jump of ``beta`` is left. Equal steps are taken in

    u = tanh(asinh(q) / 3),    dz/du = 3/(1 - u^2) (eps - sin(th) z)

linear in the noise level where that is small, so that fine structure is not stepped over, and
nearly logarithmic where it is large, where a network's error (``1/cos(th)`` in ``th``) is steep.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .precision import widest
from .sde.base import GaussianSDE, as_time

FIRST_STEP = 0.003
"""Longest first step of adaptive methods away from data, as a fraction of the way: to ``q`` of
about 0.01."""


class Point(NamedTuple):
    """A point of the path: ``dz/ds = rate (eps - sin z)``, ``scale = z/x``; in float64."""

    t: Tensor
    sigma: Tensor
    scale: Tensor
    sin: Tensor
    rate: Tensor

    def velocity(self, eps: Tensor, z: Tensor | float) -> Tensor:
        """``dz/ds``; with the divergence of ``eps`` a dimension and 1, that of its divergence."""
        return (eps - self.sin * z) * self.rate

    def beside(self, x: Tensor) -> Point:
        """The same where it broadcasts against ``x (B, *shape)``.

        Values of shape ``(B,)`` go to its device, in its dtype, but time in the most precise one;
        scalars stay on the CPU, where they cost nothing and combine with anything.
        """
        if not self.t.ndim:
            return self
        t, *rest = (v.reshape(-1, *(1,) * (x.ndim - 1)) for v in self)
        return Point(t.to(x.device, widest(x.device)), *(v.to(x.device, x.dtype) for v in rest))


class Path:
    """The way from ``t_min`` to ``t_max`` as a fraction ``s`` in [0, 1], linear in ``u``."""

    def __init__(self, sde: GaussianSDE, t_min: float, t_max: float) -> None:
        self.sde, self.t_min, self.t_max = sde, t_min, t_max
        self._start = math.tanh(math.asinh(math.exp(-float(sde.log_snr(t_min)))) / 3)
        end = math.tanh(math.asinh(math.exp(-float(sde.log_snr(t_max)))) / 3)
        self._length = end - self._start

    @property
    def first_step(self) -> float:
        """Fraction at which the noise level has grown tenfold, at most 0.003.

        A network is a function of ``log q``, and Dormand and Prince's error estimate hardly sees
        the first point of a step: a first step over many decades of ``q`` would pass unnoticed.
        """
        q = math.sinh(3 * math.atanh(self._start))
        decade = (math.tanh(math.asinh(10 * q) / 3) - self._start) / self._length
        return min(decade, FIRST_STEP) if decade > 0 else FIRST_STEP

    def time(self, s: float | Tensor) -> Tensor:
        """Time at the fraction ``s``; never outside ``[t_min, t_max]``, whatever the rounding."""
        s = as_time(s)
        q = torch.sinh(3 * torch.atanh(self._start + s * self._length))
        t = self.sde.time(-q.log()).clamp(self.t_min, self.t_max)
        return torch.where(s <= 0, self.t_min, torch.where(s >= 1, self.t_max, t))

    def cos(self, s: float | Tensor) -> Tensor:
        """``cos(th)``, the factor of the data in ``z``, at the fractions ``s``."""
        q = torch.sinh(3 * torch.atanh(self._start + as_time(s) * self._length))
        return 1 / torch.hypot(q, torch.ones_like(q))

    def __call__(self, s: float | Tensor) -> Point:
        """All coefficients at the fractions ``s``, of its shape."""
        t = self.time(s)
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        scale = 1 / torch.hypot(alpha, sigma)
        u = self._start + as_time(s).clamp(0, 1) * self._length
        return Point(t, sigma, scale, sigma * scale, 3 * self._length / (1 - u**2))
