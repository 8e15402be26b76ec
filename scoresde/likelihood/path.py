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
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..sde.base import GaussianSDE

Divergence = Callable[[Callable[[Tensor], Tensor], Tensor], tuple[Tensor, Tensor]]
FIRST_STEP = 0.003
"""Longest first step of adaptive methods, as a fraction of the way: to ``q`` of about 0.01."""


class Halt(Exception):  # noqa: N818 (an end, not an error)
    """The solve cannot go on; the message says why."""


class Point(NamedTuple):
    """A point of the path: ``rate = (dz/ds) / (eps - sin z)``, ``scale = z/x``."""

    t: float
    sigma: float
    scale: float
    sin: float
    rate: float


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

    def time(self, s: float) -> float:
        """Time at the fraction ``s``; never outside ``[t_min, t_max]``, whatever the rounding."""
        if s <= 0 or s >= 1:
            return self.t_min if s <= 0 else self.t_max
        q = math.sinh(3 * math.atanh(self._start + s * self._length))
        return min(max(float(self.sde.time(-math.log(q))), self.t_min), self.t_max)

    def __call__(self, s: float) -> Point:
        """All coefficients at the fraction ``s``."""
        t = self.time(s)
        alpha, sigma = float(self.sde.alpha(t)), float(self.sde.sigma(t))
        scale = 1 / math.hypot(alpha, sigma)
        u = self._start + min(max(s, 0.0), 1.0) * self._length
        return Point(t, sigma, scale, sigma * scale, 3 * self._length / (1 - u**2))


class Flow:
    """Right-hand side of the ODE for the state ``y = (z, delta/D)`` of shape ``(B, D + k)``.

    ``k`` is the number of separate estimates of the divergence. It counts evaluations, refuses
    those over the budget, and remembers where the solver last stood.

    Args:
        score: the score.
        path: the way.
        divergence: gives ``(f(z), div f (B, k))`` of a field at ``z``.
        shape: shape ``(B, *shape)`` of the batch.
        cond: further arguments of the score.
        max_nfe: evaluations allowed.
        progress: called before each step as ``progress(fraction, t, nfe)``.
    """

    def __init__(
        self,
        score: Any,
        path: Path,
        divergence: Divergence,
        shape: tuple[int, ...],
        cond: dict[str, Any],
        max_nfe: int,
        progress: Callable[[float, float, int], None] | None = None,
    ) -> None:
        self.path, self.shape, self.nfe = path, shape, 0
        self.dims = math.prod(shape[1:])
        self.at: tuple[float, Tensor] | None = None
        self._score, self._divergence, self._cond = score, divergence, cond
        self._max_nfe, self._progress = max_nfe, progress

    def __call__(self, s: Tensor | float, y: Tensor) -> Tensor:
        """``dy/ds``, one evaluation of the score."""
        point = self.path(float(s))
        if self.nfe >= self._max_nfe:
            raise Halt(f"max_nfe={self._max_nfe} evaluations are used up")
        self.nfe += 1
        t = torch.tensor(point.t, dtype=torch.float64)

        def noise(z: Tensor) -> Tensor:
            return -point.sigma * self._score(z / point.scale, t, **self._cond)

        z = y[:, : self.dims]
        eps, div = self._divergence(noise, z.reshape(self.shape))
        velocity = (eps.flatten(1) - point.sin * z) * point.rate
        out = torch.cat([velocity, (div / self.dims - point.sin) * point.rate], 1).to(y.dtype)
        finite = out.isfinite().all(1)
        if not bool(finite.all()):
            item = int((~finite).nonzero()[0])
            raise Halt(f"score or divergence of item {item} is not finite at t={point.t:.6g}")
        return out

    def callback_step(self, s: Tensor | float, y: Tensor, step: Tensor | float) -> None:
        """Called by the solver where a step starts."""
        self.at = (float(s), y)
        if self._progress is not None:
            self._progress(float(s), self.path.time(float(s)), self.nfe)

    def norm(self, y: Tensor) -> Tensor:
        """The largest error of any sample: RMS over its entries, or over its divergences."""
        parts = (y[:, : self.dims], y[:, self.dims :])
        return torch.stack([part.square().mean(1).sqrt().max() for part in parts]).max()
