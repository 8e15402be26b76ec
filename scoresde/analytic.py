r"""Distributions whose score is known in closed form under every Gaussian process.

If the data are a mixture ``sum_k w_k N(mu_k, S_k)``, the marginal at time ``t`` is the mixture
``sum_k w_k N(alpha mu_k, alpha^2 S_k + sigma^2 I)``: its density, score, posterior and samples are
exact. Tests, benchmarks and teaching stand on it.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from .model import Score
from .sde.base import GaussianSDE, as_time

CACHED = 2**16
"""Numbers of an intermediate tensor that a CPU's cache holds: larger batches go in parts."""


class GaussianMixture:
    """``p(x) = sum_k w_k N(x; mu_k, diag(std_k^2))`` over items of any shape.

    Args:
        weights: ``(K,)``, > 0; normalised to sum one.
        means: ``(K, *shape)``.
        stds: standard deviations, ``(K,)`` (isotropic) or ``(K, *shape)``, > 0.
    """

    def __init__(self, weights: Any, means: Any, stds: Any) -> None:
        means = torch.as_tensor(means)
        dtype = means.dtype if means.is_floating_point() else torch.get_default_dtype()
        self.means = means.to(dtype)
        self.shape = tuple(means.shape[1:])
        weights = torch.as_tensor(weights, dtype=dtype, device=means.device)
        stds = torch.as_tensor(stds, dtype=dtype, device=means.device)
        if weights.shape != means.shape[:1]:
            raise ValueError(
                f"weights of shape {tuple(weights.shape)} do not fit "
                f"means of shape {tuple(means.shape)}: one weight a component"
            )
        if stds.shape not in (means.shape[:1], means.shape):
            raise ValueError(
                f"stds of shape {tuple(stds.shape)} do not fit means of shape "
                f"{tuple(means.shape)}: (K,) or (K, *shape)"
            )
        if not bool((weights > 0).all()) or not bool((stds > 0).all()):
            raise ValueError("weights and stds must be positive")
        self.weights = weights / weights.sum()
        self.stds = stds.reshape(*stds.shape, *(1,) * (means.ndim - stds.ndim)).expand_as(means)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GaussianMixture:
        """The same mixture on another device or in another dtype."""
        dtype = dtype or self.means.dtype
        parts = (p.to(device=device, dtype=dtype) for p in (self.weights, self.means, self.stds))
        return GaussianMixture(*parts)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` draws, shape ``(n, *shape)``."""
        device = generator.device if generator is not None else self.means.device
        k = torch.multinomial(self.weights.to(device), n, replacement=True, generator=generator)
        noise = torch.randn(
            (n, *self.shape), generator=generator, device=device, dtype=self.means.dtype
        )
        k, noise = k.to(self.means.device), noise.to(self.means.device)
        return self.means[k] + self.stds[k] * noise

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean ``shape`` and covariance ``(D, D)`` of the flattened item."""
        means, variances = self.means.flatten(1), self.stds.flatten(1) ** 2
        mean = self.weights @ means
        centred = means - mean
        covariance = (self.weights[:, None] * centred).T @ centred
        covariance = covariance + torch.diag(self.weights @ variances)
        return mean.reshape(self.shape), covariance

    def log_prob(
        self, x: Tensor, sde: GaussianSDE | None = None, t: float | Tensor | None = None
    ) -> Tensor:
        """Log-density in nats of ``x (B, *shape)``, shape ``(B,)``: of the data, or at time t."""
        return torch.logsumexp(self._log_components(x, *self._marginal(x, sde, t))[0], 1)

    def score(self, sde: GaussianSDE) -> MixtureScore:
        """The exact score of this mixture diffused by ``sde``."""
        return MixtureScore(self, sde)

    def _marginal(
        self, x: Tensor, sde: GaussianSDE | None, t: float | Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Means and variances at time ``t``, each ``(1 or B, K, D)``."""
        means, variances = self.means.flatten(1)[None], self.stds.flatten(1)[None] ** 2
        if sde is None:
            return means, variances
        if t is None:
            raise ValueError("a density under an SDE needs a time t")
        t = as_time(t, x)
        alpha = sde.alpha(t).reshape(-1, 1, 1).to(means)
        sigma = sde.sigma(t).reshape(-1, 1, 1).to(means)
        return alpha * means, alpha**2 * variances + sigma**2

    def _log_components(
        self, x: Tensor, means: Tensor, variances: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``log w_k N(x; ...)`` of shape ``(B, K)``, and each component's score ``(B, K, D)``."""
        residual = x.flatten(1)[:, None].to(means.dtype) - means
        pull = residual / variances
        log_norm = (variances.log() + math.log(2 * math.pi)).sum(2) / 2
        return self.weights.log() - (residual * pull).sum(2) / 2 - log_norm, -pull


class MixtureScore(Score):
    """Exact score of a diffused :class:`GaussianMixture`; computes in the mixture's dtype."""

    def __init__(self, mixture: GaussianMixture, sde: GaussianSDE) -> None:
        self.mixture = mixture
        self.sde = sde
        self.shape = mixture.shape
        self.device = mixture.means.device
        self.dtype = mixture.means.dtype

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        """``sum_k p(k | x_t) (alpha mu_k - x)/(alpha^2 S_k + sigma^2)``, the shape of ``x``."""
        rows = max(1, CACHED // self.mixture.means.numel())
        if x.device.type != "cpu" or len(x) <= rows:
            return self._score(x, t)
        t = as_time(t, x)
        times = t.split(rows) if t.numel() > 1 else itertools.repeat(t)
        return torch.cat([self._score(*part) for part in zip(x.split(rows), times, strict=False)])

    def _score(self, x: Tensor, t: float | Tensor) -> Tensor:
        """The same, of all samples at once."""
        means, variances = self.mixture._marginal(x, self.sde, t)
        log_components, scores = self.mixture._log_components(x, means, variances)
        share = torch.softmax(log_components, 1)[:, :, None]
        return (share * scores).sum(1).reshape(x.shape).to(x.dtype)
