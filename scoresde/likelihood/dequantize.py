r"""Dequantisation: from a density in model range to probabilities of discrete data.

Levels ``k`` fill bins of the model's range, ``x = encode(k + u) = (k + u - shift) scale``. Any
density ``q`` on the bin, times an optional decoder, bounds the probability of ``k`` from below:

    log P(k) = log int_bin p_t(x) dx >= E_q[log p_t(x) - log q(x | k)]
    log P(k) = log int P(k | x) p_t(x) dx >= E_q[log p_t(x) + log P(k | x) - log q(x | k)]

The gap is ``KL(q | p(x | k))``: uniform noise leaves most of it, a learned ``q`` less. ``K`` draws
give more than their mean, ``E log (1/K) sum_j p(x_j)/q(x_j | k)``, which grows with ``K``.

Uniform noise puts data at ``t = 0``, where no score is trained. ``truncated-normal`` and
``decoder`` start at a time ``t``, at the states that the forward process makes of the bin's
centre; the former counts the bin ``alpha_t bin`` of ``p_t``, the latter decodes.

Sources: A note on the evaluation of generative models (Theis et al., 2016),
https://arxiv.org/abs/1511.01844; Importance Weighted Autoencoders (Burda et al., 2016),
https://arxiv.org/abs/1509.00519; Improved Techniques for Maximum Likelihood Estimation for
Diffusion ODEs (Zheng et al., 2023), https://arxiv.org/abs/2305.03935; Variational Diffusion Models
(Kingma et al., 2021), https://arxiv.org/abs/2107.00630.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from ..noise import KeyedNoise
from ..precision import widest
from ..sde.base import GaussianSDE
from .variational import Variational

if TYPE_CHECKING:
    from ..data.scaler import Scaler

REACH = 16.0
"""Standard deviations that the decoder sums over: 6.8 that a keyed normal may have, and 9.2 more,
beyond which a level has a share below 1e-18."""


class Dequantized(NamedTuple):
    """A draw of ``x ~ q(x | k)``: ``log P(k) >= E[log p_t(x) - log_q]``, ``t = t_min``, in nats.

    Attributes:
        x: state in model range, ``(B, *shape)``, float64 if the data were, else float32.
        log_q: ``log q(x | k)`` less what decodes, log-determinants included, ``(B,)``.
        t_min: time whose marginal density is meant, None for the default of the likelihood.
    """

    x: Tensor
    log_q: Tensor
    t_min: float | None


class Dequantization(Protocol):
    """A way to draw states for discrete data."""

    def draw(self, k: Tensor, scaler: Scaler, sde: GaussianSDE, source: KeyedNoise) -> Dequantized:
        """One draw for each item, that depends on its own noise alone.

        Args:
            k: whole levels ``0..levels-1``, integer or floating point, ``(B, *shape)``.
            scaler: map to model range, with levels.
            sde: process whose marginal densities are meant.
            source: keyed noise of these items.

        Raises:
            ValueError: continuous data, values that are no levels, or times not trained.
        """
        ...


@dataclass(frozen=True)
class Uniform:
    """``u ~ U[0, 1)``, so that ``log_q = -log|d model / d data|``."""

    def draw(self, k: Tensor, scaler: Scaler, sde: GaussianSDE, source: KeyedNoise) -> Dequantized:
        """As :meth:`Dequantization.draw`."""
        levels_of(k, scaler)
        u = source.uniform(tuple(k.shape), k.device, torch.float32)
        log_q = u.new_full((len(k),), -scaler.log_det(tuple(k.shape[1:])), dtype=widest(k.device))
        return Dequantized(scaler.encode(k, noise=u), log_q, None)


@dataclass(frozen=True)
class TruncatedNormal:
    r"""The forward process at the bin's centre ``c``, truncated to the bin.

        x = alpha c + sigma eps,  eps ~ N(0, 1) given |eps| <= tau,  tau = alpha width/(2 sigma)
        log q = sum -eps^2/2 - log(sqrt(2 pi) sigma Z),    Z = erf(tau/sqrt 2)

    It suits a score of data on the centres, ``encode(k, dequantize=False)``. One that was trained
    on uniformly dequantised data spreads over the bin, and loses by it.

    Args:
        tau: half the (narrowest) bin in standard deviations, > 0; it decides the time, and is
            larger where the scale of an entry is.

    Source: Improved Techniques for Maximum Likelihood Estimation for Diffusion ODEs (Zheng et al.,
    2023), section 4.1, https://arxiv.org/abs/2305.03935.
    """

    tau: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.tau < math.inf:
            raise ValueError(f"truncated-normal needs a finite tau > 0, got {self.tau}")

    def draw(self, k: Tensor, scaler: Scaler, sde: GaussianSDE, source: KeyedNoise) -> Dequantized:
        """As :meth:`Dequantization.draw`."""
        levels_of(k, scaler)
        t = self.time(scaler, sde)
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        tau = alpha / sigma * bin_width(k, scaler).abs() / 2
        v = source.uniform(tuple(k.shape), k.device, widest(k.device)) + 2.0**-25  # in (0, 1)
        # In the lower half, where neither the distribution function nor its inverse cancels.
        inside = torch.erf(tau / math.sqrt(2))
        low = torch.special.ndtri(torch.special.ndtr(-tau) + torch.minimum(v, 1 - v) * inside)
        eps = torch.where(v < 0.5, low, -low).clamp(-tau, tau)
        log_q = -(eps**2) / 2 - (inside * (math.sqrt(2 * math.pi) * sigma)).log()
        return Dequantized(_state(k, scaler, alpha, sigma, eps), log_q.flatten(1).sum(1), t)

    def time(self, scaler: Scaler, sde: GaussianSDE) -> float:
        """The time at which half the narrowest bin is ``tau`` standard deviations.

        Raises:
            ValueError: if it lies outside the trained times.
        """
        half = min(abs(v) for v in scaler.scale) / 2
        log_snr = math.log(self.tau / half)
        first, last = (float(sde.log_snr(t)) for t in (sde.t_min, sde.t_max))
        if not last < log_snr <= first:
            side = f"below the trained t_min={sde.t_min:g}"
            if log_snr <= last:
                side = f"beyond t_max={sde.t_max:g}"
            raise ValueError(
                f"truncated-normal with tau={self.tau:g} starts {side} of {type(sde).__name__}: "
                f"it takes tau in ({half * math.exp(last):.3g}, {half * math.exp(first):.3g}]"
            )
        return max(float(sde.time(log_snr)), sde.t_min)

    def entropy(self, shape: tuple[int, ...], scaler: Scaler, sde: GaussianSDE) -> float:
        """``E[-log q] = sum log(sqrt(2 pi e) sigma Z) - tau phi(tau)/Z`` of an item, in nats.

        Args:
            shape: of one item.
            scaler: map to model range.
            sde: the process.
        """
        t = self.time(scaler, sde)
        sigma = float(sde.sigma(t))
        ones = torch.ones((1, *shape), dtype=torch.float64)
        tau = float(sde.alpha(t)) / sigma * bin_width(ones, scaler).abs() / 2
        inside = torch.erf(tau / math.sqrt(2))
        density = torch.exp(-(tau**2) / 2) / math.sqrt(2 * math.pi)
        scale = (inside * (math.sqrt(2 * math.pi * math.e) * sigma)).log()
        return float((scale - tau * density / inside).sum())


@dataclass(frozen=True)
class Decoder:
    r"""The forward process at the bin's centre, and a decoder of what it leaves.

        x = alpha c_k + sigma eps,    eps ~ N(0, 1),    log_q = log q(x | k) - log P(k | x)
        P(k | x) = softmax_k of -(x - alpha c_k)^2/(2 sigma^2), entry by entry

    which bounds the probability of the model that draws ``x ~ p_t`` and then ``k ~ P(k | x)``.
    It too is for a score of data on the centres.

    Args:
        t: the time, at least the trained ``t_min``; None for ``sde.t_min_likelihood``.

    Source: Variational Diffusion Models (Kingma et al., 2021), equation 8,
    https://arxiv.org/abs/2107.00630.
    """

    t: float | None = None

    def draw(self, k: Tensor, scaler: Scaler, sde: GaussianSDE, source: KeyedNoise) -> Dequantized:
        """As :meth:`Dequantization.draw`."""
        levels = levels_of(k, scaler)
        t = sde.t_min_likelihood if self.t is None else float(self.t)
        if not sde.t_min <= t < sde.t_max or not float(sde.sigma(t)) > 0:
            raise ValueError(
                f"decoder t={t:g} lies outside the times of {type(sde).__name__} that have noise "
                f"and are trained, [{sde.t_min:g}, {sde.t_max:g})"
            )
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        eps = source.normal(tuple(k.shape), k.device, widest(k.device))
        log_q = -(eps**2) / 2 - math.log(math.sqrt(2 * math.pi) * sigma)
        decoded = decode(k, eps, alpha / sigma * bin_width(k, scaler), levels)
        log_q = (log_q - decoded).flatten(1).sum(1)
        return Dequantized(_state(k, scaler, alpha, sigma, eps), log_q, t)


def decode(k: Tensor, eps: Tensor, step: Tensor, levels: int) -> Tensor:
    """``log P(k | x)`` of each entry, for ``x`` that is ``eps`` from ``k`` in standard deviations.

        -log1p(sum over m != 0 of exp(m step (eps - m step/2))),    m = j - k

    It cancels nothing, and takes the levels one after another, as far as any can count.

    Args:
        k: whole levels, ``(B, *shape)``.
        eps: ``(x - alpha c_k)/sigma``, ``(B, *shape)``.
        step: ``alpha/sigma`` times the (signed) distance of levels, ``(1, *shape)``.
        levels: their number.
    """
    k = k.to(torch.int64)
    others = torch.zeros_like(eps)
    for m in range(1, min(levels - 1, math.ceil(REACH / float(step.abs().min()))) + 1):
        up = torch.exp(m * step * (eps - m * step / 2))
        down = torch.exp(-m * step * (eps + m * step / 2))
        others += up.masked_fill(k + m >= levels, 0) + down.masked_fill(k < m, 0)
    return -torch.log1p(others)


def importance_weighted(values: Tensor) -> tuple[Tensor, Tensor]:
    r"""The bound of all draws together, ``log (1/K) sum_j exp(values_j)``, and its standard error.

    The error is that of the mean of the weights over the mean (delta method); the bound itself
    still lies below ``log P(k)`` by about half the square of it. Both are of the shape ``(B,)``.

    Args:
        values: ``log p(x_j) - log q(x_j | k)`` of each draw, nats, ``(K, B)``.

    Raises:
        ValueError: for another shape.
    """
    count = _draws(values)
    log_prob = torch.logsumexp(values, 0) - math.log(count)
    if count == 1:
        return log_prob, torch.full_like(log_prob, math.nan)
    return log_prob, torch.exp(values - log_prob).std(0) / math.sqrt(count)


def mean_bound(values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over draws and its standard error, ``(B,)`` each, of values ``(K, B)`` in nats.

    Raises:
        ValueError: for another shape.
    """
    count = _draws(values)
    if count == 1:
        return values[0], torch.full_like(values[0], math.nan)
    return values.mean(0), values.std(0) / math.sqrt(count)


def levels_of(k: Tensor, scaler: Scaler) -> int:
    """The number of levels, after a look at the data.

    Raises:
        ValueError: continuous data, or values that are no levels.
    """
    if scaler.levels is None:
        raise ValueError("continuous data has a density in nats, and nothing to dequantise")
    if k.ndim < 2 or k.numel() == 0:
        raise ValueError(f"k must have shape (B, *shape) and not be empty, got {tuple(k.shape)}")
    whole = k if not k.is_floating_point() else k.floor()
    last = scaler.levels - 1  # 256 itself is no uint8
    if not bool(((k == whole) & (k >= 0) & (k <= last)).all()):
        raise ValueError(f"discrete data must be whole levels 0..{scaler.levels - 1}")
    return scaler.levels


def bin_width(k: Tensor, scaler: Scaler) -> Tensor:
    """What a level spans in model range, of the sign of the scale, ``(1, *shape)``."""
    ones = torch.ones((1, *k.shape[1:]), dtype=widest(k.device), device=k.device)
    return 1 / scaler.difference(ones)


def _state(k: Tensor, scaler: Scaler, alpha: float, sigma: float, eps: Tensor) -> Tensor:
    """``alpha c_k + sigma eps``, rounded once, at the end."""
    centre = scaler.encode(k, dequantize=False)
    return (alpha * centre.to(eps.dtype) + sigma * eps).to(centre.dtype)


def _draws(values: Tensor) -> int:
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"values must have shape (draws, B), got {tuple(values.shape)}")
    return len(values)


__all__ = ["Decoder", "TruncatedNormal", "Uniform", "Variational"]
