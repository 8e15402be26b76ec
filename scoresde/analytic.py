r"""Distributions whose score is known in closed form under every Gaussian process.

If the data are a mixture ``sum_k w_k N(mu_k, S_k)``, the marginal at time ``t`` is the mixture
``sum_k w_k N(alpha mu_k, alpha^2 S_k + sigma^2 I)``: its density, score, posterior and samples are
exact. Conditioned on a linear measurement they are a mixture again. Tests, benchmarks and teaching
stand on it. Here are the diagonal ``S_k``; :mod:`scoresde.correlated` has full ones.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .model import Score
from .sde.base import GaussianSDE, as_time, match

if TYPE_CHECKING:
    from .correlated import CorrelatedMixture
    from .inverse.operator import Operator

CACHED = 2**16
"""Numbers of an intermediate tensor that a CPU's cache holds: larger batches go in parts."""


class Mixture(ABC):
    """``p(x) = sum_k w_k N(x; mu_k, S_k)`` over items of any shape."""

    weights: Tensor
    """``(K,)``, of sum one."""
    means: Tensor
    """``(K, *shape)``."""
    shape: tuple[int, ...]
    """Of one item."""

    @abstractmethod
    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Mixture:
        """The same mixture on another device or in another dtype."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` draws, shape ``(n, *shape)``."""
        k, noise = self._draw(n, generator)
        return self.means[k] + self._coloured(k, noise)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean ``shape`` and covariance ``(D, D)`` of the flattened item."""
        means = self.means.flatten(1)
        mean = self.weights @ means
        centred = means - mean
        covariance = (self.weights[:, None] * centred).T @ centred
        covariance = covariance + self._covariance(self.weights[None], self._variances()[None])[0]
        return mean.reshape(self.shape), covariance

    def log_prob(
        self, x: Tensor, sde: GaussianSDE | None = None, t: float | Tensor | None = None
    ) -> Tensor:
        """Log-density in nats of ``x (B, *shape)``, shape ``(B,)``: of the data, or at time t."""
        return torch.logsumexp(self._log_components(x, *self._marginal(x, sde, t))[0], 1)

    def score(self, sde: GaussianSDE) -> MixtureScore:
        """The exact score of this mixture diffused by ``sde``."""
        return MixtureScore(self, sde)

    def posterior(
        self, operator: Operator, y: Tensor, noise_std: float | Tensor
    ) -> CorrelatedMixture:
        """The exact posterior of ``x`` given ``y = A x + noise_std e``, component by component.

        See :func:`scoresde.correlated.condition` for the equations.

        Args:
            operator: ``A``; only its measured entries count.
            y: one measurement, ``(1, *out)``.
            noise_std: of the measured entries, >= 0. Without noise every component must have a
                full covariance where it is measured.

        Raises:
            ValueError: for a measurement that does not fit, or exact ones of components without
                spread.
        """
        from .correlated import condition

        return condition(self, operator, y, noise_std)

    def log_evidence(self, operator: Operator, y: Tensor, noise_std: float | Tensor) -> Tensor:
        """``log p(y)`` in nats, over the measured entries of ``y (B, *out)``, shape ``(B,)``.

        Without noise it is the density over the range of ``A``.

        Raises:
            ValueError: as :meth:`posterior`.
        """
        from .correlated import log_evidences

        return torch.logsumexp(log_evidences(self, operator, y, noise_std), 1).to(self.means)

    def _draw(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Components ``(n,)``, and standard normals ``(n, *shape)``."""
        device = generator.device if generator is not None else self.means.device
        k = torch.multinomial(self.weights.to(device), n, replacement=True, generator=generator)
        noise = torch.randn(
            (n, *self.shape), generator=generator, device=device, dtype=self.means.dtype
        )
        return k.to(self.means.device), noise.to(self.means.device)

    def _marginal(
        self, x: Tensor, sde: GaussianSDE | None, t: float | Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Means, and variances along each component's axes, at ``t``; each ``(1 or B, K, D)``."""
        means, variances = self.means.flatten(1)[None], self._variances()[None]
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
        """``log w_k N(x; ...)`` of shape ``(B, K)``, and each component's score ``(B, K, D)``.

        The scores are along the component's axes, as ``variances`` are.
        """
        residual = self._turned(x.flatten(1)[:, None].to(means.dtype) - means)
        pull = residual / variances
        log_norm = (variances.log() + math.log(2 * math.pi)).sum(2) / 2
        return self.weights.log() - (residual * pull).sum(2) / 2 - log_norm, -pull

    @abstractmethod
    def _variances(self) -> Tensor:
        """Those along the axes of each component, ``(K, D)``."""

    @abstractmethod
    def _factors(self) -> Tensor:
        """``F_k`` of ``S_k = F_k F_k^T``, ``(K, D, R)``."""

    @abstractmethod
    def _coloured(self, k: Tensor, noise: Tensor) -> Tensor:
        """``F_k e`` of the components ``k (n,)``, of the shape of ``noise (n, *shape)``."""

    @abstractmethod
    def _turned(self, x: Tensor) -> Tensor:
        """Vectors ``(B, K, D)`` along the axes of each component."""

    @abstractmethod
    def _back(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`_turned`."""

    @abstractmethod
    def _covariance(self, share: Tensor, variances: Tensor) -> Tensor:
        """``sum_k share_k Q_k diag(variances_k) Q_k^T``, ``(B, D, D)``."""


class GaussianMixture(Mixture):
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

    def _variances(self) -> Tensor:
        return self.stds.flatten(1) ** 2

    def _factors(self) -> Tensor:
        return torch.diag_embed(self.stds.flatten(1))

    def _coloured(self, k: Tensor, noise: Tensor) -> Tensor:
        return self.stds[k] * noise

    def _turned(self, x: Tensor) -> Tensor:
        return x

    def _back(self, x: Tensor) -> Tensor:
        return x

    def _covariance(self, share: Tensor, variances: Tensor) -> Tensor:
        return torch.diag_embed((share[:, :, None] * variances).sum(1))


class MixtureScore(Score):
    """Exact score of a diffused :class:`Mixture`; computes in the mixture's dtype."""

    def __init__(self, mixture: Mixture, sde: GaussianSDE) -> None:
        self.mixture = mixture
        self.sde = sde
        self.shape = mixture.shape
        self.device = mixture.means.device
        self.dtype = mixture.means.dtype

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        """``sum_k p(k | x_t) (alpha^2 S_k + sigma^2)^-1 (alpha mu_k - x)``, as ``x`` in shape."""
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
        return self.mixture._back(share * scores).sum(1).reshape(x.shape).to(x.dtype)

    def denoised_covariance(self, x: Tensor, t: float | Tensor) -> Tensor:
        """``Cov[x_0 | x_t]`` of the flattened item, ``(B, D, D)``: that of the true posterior.

        sum_k p(k | x_t) [sigma^2 S_k (alpha^2 S_k + sigma^2)^-1 + m_k m_k^T],
        m_k = (sigma^2/alpha) (score_k - score)
        """
        t = as_time(t, x)
        means, variances = self.mixture._marginal(x, self.sde, t)
        log_components, scores = self.mixture._log_components(x, means, variances)
        share = torch.softmax(log_components, 1)
        power = match(self.sde.sigma(t) ** 2, means).reshape(-1, 1, 1)
        alpha = match(self.sde.alpha(t), means).reshape(-1, 1, 1)
        inner = power * self.mixture._variances() / variances
        within = self.mixture._covariance(share, inner.expand_as(scores))
        scores = self.mixture._back(scores)
        apart = power / alpha * (scores - (share[:, :, None] * scores).sum(1, keepdim=True))
        across = torch.einsum("bk,bki,bkj->bij", share, apart, apart)
        return (within + across).to(x.dtype)
