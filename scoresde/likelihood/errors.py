r"""Denoising errors at all noise levels, each beside that of a Gaussian at the same noise.

Every bound and density that a denoiser gives by itself is an integral over
``lam = log(alpha/sigma)`` of ``e = E|eps - eps_hat|^2``. Of data ``N(m, c^2)`` that error ``e_N``
and its integral are known in closed form, and only ``e - e_N`` is left to Monte Carlo: it vanishes
at both ends, and most of the noise cancels in it. The times are stratified, one independent draw
in each stratum, so that differences of neighbours tell the standard error without flattering it.

Sources: Information-Theoretic Diffusion (Kong, Brekelmans & Ver Steeg, 2023),
https://arxiv.org/abs/2302.03792; Variational Diffusion Models (Kingma et al., 2021),
https://arxiv.org/abs/2107.00630.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import unknown
from ..model import per_sample
from ..noise import KeyedNoise
from ..precision import widest
from ..sde.base import GaussianSDE
from .divergence import LIKELIHOOD_DRAW

TIMES = ("importance", "logistic", "uniform")
ENDS = 1 << 30
"""Draws of the noise at the ends of the integral lie this far behind those inside."""
WIDTH, CENTRE = 3.0, 1.0
"""Of the logistic density of log-SNRs, wide enough to leave no noise level out."""

Progress = Callable[[float, float, int], None]


@dataclass(frozen=True)
class Reference:
    """Data ``N(mean, std^2)`` entry by entry, whose denoising error is known in closed form.

    Args:
        mean: broadcastable to an item, in model range.
        std: likewise, > 0.
    """

    mean: Any = 0.0
    std: Any = 1.0

    def on(self, x: Tensor) -> Reference:
        """The same as tensors beside ``x (B, *shape)``.

        Raises:
            ValueError: if a moment does not fit an item, or is not a positive ``std``.
        """
        mean, std = (torch.as_tensor(v, dtype=x.dtype, device=x.device) for v in self._pair)
        try:
            mean, std = mean.expand(x.shape[1:]), std.expand(x.shape[1:])
        except RuntimeError as error:
            raise ValueError(
                f"reference must broadcast to an item of shape {tuple(x.shape[1:])}, "
                f"got {tuple(mean.shape)} and {tuple(std.shape)}"
            ) from error
        if not bool(mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            raise ValueError("reference needs a finite mean and a finite std > 0")
        return Reference(mean, std)

    @property
    def _pair(self) -> tuple[Any, Any]:
        return self.mean, self.std

    def noise(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """``eps_hat = sigma (x - alpha m)/(alpha^2 c^2 + sigma^2)``."""
        return sigma * (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)

    def error(self, x: Tensor, log_snr: float) -> Tensor:
        """``int_{-inf}^{log_snr} e_N d lam`` of each item, ``(B,)``.

        With ``w = 1/(1 + 1/(snr c^2))``, ``e_N = w^2 + w (1 - w) (x - m)^2/c^2`` and ``dw/d lam =
        2 w (1 - w)``, hence ``1/2 [-log(1 - w) - w + w (x - m)^2/c^2]``.
        """
        logit = 2 * (log_snr + self.std.log())
        surprise = ((x - self.mean) / self.std) ** 2 - 1
        value = torch.nn.functional.softplus(logit) + torch.sigmoid(logit) * surprise
        return value.flatten(1).sum(1) / 2

    def log_prob(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """``log N(x; alpha m, alpha^2 c^2 + sigma^2)``, ``(B,)``."""
        variance = alpha**2 * self.std**2 + sigma**2
        z2 = (x - alpha * self.mean) ** 2 / variance
        return -(z2 + variance.log() + math.log(2 * math.pi)).flatten(1).sum(1) / 2


class Points(NamedTuple):
    """Where ``int f d lam`` is evaluated: kernel ``x_t = a x + v eps``; float64, ``(B, K)``.

    ``weight`` is ``d lam`` over the density of the points, ``tilt`` that times ``sigma/v``.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    a: Tensor
    v: Tensor
    weight: Tensor
    tilt: Tensor


def spread(
    sde: GaussianSDE, u: Tensor, times: str, t_min: float, t_max: float, *, after: bool = False
) -> Points:
    """Points at the fractions ``u`` in [0, 1) of the way from ``t_min`` to ``t_max``.

    Args:
        sde: the process.
        u: fractions, float64 on the CPU, any shape.
        times: ``"importance"``, ``"logistic"`` or ``"uniform"``.
        t_min: start, of finite log-SNR; ``t_max`` the end.
        after: whether the kernel starts at ``t_min``, not at the data. Then ``cosh y = q/q_min``
            with ``q = sigma/alpha`` takes the place of the log-SNR: ``v = sigma tanh y`` and
            ``d lam = tanh y dy``, so that what is divided by ``v`` stays finite.
    """
    first, last = float(sde.log_snr(t_min)), float(sde.log_snr(t_max))
    if times == "uniform":
        t = t_min + u * (t_max - t_min)
        weight = (t_max - t_min) / 2 * (sde.diffusion(t) / sde.sigma(t)) ** 2
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        return Points(t, alpha, sigma, alpha, sigma, weight, weight)
    way, shift = first - last, 0.0
    if after:
        way, shift = math.acosh(math.exp(way)), math.log(2)  # y = lam_min - lam + log 2, soon
    s, density = u * way, torch.full_like(u, way)
    if times == "logistic":
        centre = first - CENTRE + shift
        low, high = (math.tanh((end - centre) / WIDTH) for end in (0.0, way))
        h = low + u * (high - low)
        s = (centre + WIDTH * torch.atanh(h)).clamp(0, way)
        density = WIDTH * (high - low) / (1 - h**2)
    tanh = torch.tanh(s) if after else torch.ones_like(s)
    # log cosh y, without overflow
    dropped = s + torch.nn.functional.softplus(-2 * s) - math.log(2) if after else s
    t = sde.time(first - dropped).clamp(t_min, t_max)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    a = (sde.log_alpha(t) - sde.log_alpha(t_min)).exp() if after else alpha
    return Points(t, alpha, sigma, a, sigma * tanh, density * tanh, density)


class Errors:
    """Denoising errors of ``x``, each beside that of a reference at the same noise.

    Args:
        score: the score.
        x: data, or the state at ``t_min``, ``(B, *shape)``.
        reference: Gaussian that is subtracted; None to subtract nothing.
        seed: key of the noise.
        start_index: index of the first sample.
        cond: passed to the score.
    """

    def __init__(
        self,
        score: Any,
        x: Tensor,
        reference: Reference | None,
        seed: int,
        start_index: int,
        cond: dict[str, Any],
    ) -> None:
        self.score, self.x, self.cond = score, x, per_sample(cond, x)
        self.reference = None if reference is None else reference.on(x)
        self.seed, self.start, self.nfe = seed, start_index, 0

    def along(self, points: Points, budget: int, progress: Progress | None = None) -> Tensor:
        """Estimates of ``int [e - e_N] d lam`` by each of the points, ``(B, K)``."""
        values = []
        for k in range(points.t.shape[1]):
            column = Points(*(part[:, k] for part in points))
            if progress is not None:
                progress(self.nfe / budget, float(column.t.mean()), self.nfe)
            eps, eps_hat, x = self.noises(column, k)
            values.append(self._value(column, eps, eps_hat, x))
        return torch.stack(values, 1)

    def at(self, sde: GaussianSDE, t: float, draws: int, draw: int = 0) -> Tensor:
        """``e - e_N`` at one time, by the ends' noise ``draw, draw + 1, ...``, ``(B, draws)``."""
        one = torch.full((len(self.x),), t, dtype=torch.float64)
        alpha, sigma, unit = sde.alpha(one), sde.sigma(one), torch.ones_like(one)
        column = Points(one, alpha, sigma, alpha, sigma, unit, unit)
        drawn = (self.noises(column, ENDS + draw + i) for i in range(draws))
        return torch.stack([self._value(column, *noises) for noises in drawn], 1)

    def noises(self, point: Points, draw: int) -> tuple[Tensor, Tensor, Tensor]:
        """``eps``, ``eps_hat = -sigma score`` and ``x_t`` at a point ``(B,)``; one evaluation."""
        self.nfe += 1
        source = KeyedNoise(self.seed, self.start)
        source.draw = LIKELIHOOD_DRAW + 1 + draw
        eps = source.normal(tuple(self.x.shape), self.x.device, self.x.dtype)
        x = self._beside(point.a) * self.x + self._beside(point.v) * eps
        t = self._beside(point.t, widest(x.device))
        eps_hat = self._beside(-point.sigma) * self.score(x, t, **self.cond)
        return eps, eps_hat, x

    def _value(self, point: Points, eps: Tensor, eps_hat: Tensor, x: Tensor) -> Tensor:
        """``weight (|e_hat|^2 - |e_N|^2) - 2 tilt (e_hat - e_N) . eps``, each item's, ``(B,)``."""
        weight, tilt = self._beside(point.weight), self._beside(point.tilt)
        if self.reference is None:
            return (weight * (eps - eps_hat) ** 2).flatten(1).sum(1)
        alpha, sigma = self._beside(point.alpha), self._beside(point.sigma)
        other = self.reference.noise(x, alpha, sigma)
        product = (eps_hat - other) * (weight * (eps_hat + other) - 2 * tilt * eps)
        return product.flatten(1).sum(1)

    def _beside(self, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A coefficient ``(B,)`` where it broadcasts against ``x``."""
        value = value.to(self.x.device, dtype or self.x.dtype)
        return value.reshape(-1, *(1,) * (self.x.ndim - 1))


def fractions(x: Tensor, terms: int, seed: int, start_index: int) -> Tensor:
    """One fraction in each of ``terms`` equal parts of [0, 1), keyed, float64, ``(B, terms)``."""
    source = KeyedNoise(seed, start_index)
    source.draw = LIKELIHOOD_DRAW
    jitter = source.uniform((len(x), terms), dtype=torch.float64) + 2.0**-25
    return (torch.arange(terms, dtype=torch.float64) + jitter) / terms


def stratified_stderr(values: Tensor) -> Tensor:
    """Standard error of ``values.mean(1)``, one independent draw in each stratum, ``(B,)``.

    Half the squared difference of neighbours estimates their mean variance, plus half the squared
    difference of their means: never too small in expectation. The pairs at both ends count twice,
    as their outer member has one neighbour alone. nan for a single draw.
    """
    count = values.shape[1]
    if count < 2:
        return torch.full_like(values[:, 0], math.nan)
    squares = values.diff(dim=1).square()
    return ((squares.sum(1) + squares[:, 0] + squares[:, -1]) / 2).sqrt() / count


def mean_stderr(values: Tensor) -> Tensor:
    """Standard error of ``values.mean(1)`` of independent draws, ``(B,)``; nan for one."""
    if values.shape[1] < 2:
        return torch.full_like(values[:, 0], math.nan)
    return values.std(1) / values.shape[1] ** 0.5


def interval(
    sde: GaussianSDE, terms: int, draws: int, times: str, t_min: float | None
) -> tuple[float, float]:
    """``(t_min, t_max)`` of the integral, after checks of how it is to be taken.

    Raises:
        ValueError: too few terms or draws, or times without a score or a finite log-SNR.
        ConfigError: unknown ``times``.
    """
    if times not in TIMES:
        raise unknown("times", times, TIMES)
    if not (1 <= terms < ENDS and draws >= 1):
        raise ValueError(f"the integral needs terms >= 1 and draws >= 1, got {terms} and {draws}")
    start = sde.t_min_likelihood if t_min is None else t_min
    if not sde.t_min <= start < sde.t_max or not math.isfinite(float(sde.log_snr(start))):
        raise ValueError(
            f"t_min={start:g} must lie in the trained times [{sde.t_min:g}, {sde.t_max:g}) "
            "and have a finite log-SNR"
        )
    return start, sde.t_max
