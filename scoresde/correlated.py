r"""Mixtures of Gaussians with full covariances, and the posteriors of linear measurements.

Each covariance is diagonalised once, ``S_k = Q_k diag(l_k) Q_k^T``. Under every Gaussian process
the marginal keeps the axes ``Q_k``, and the variances along them are ``alpha^2 l_k + sigma^2``.

Given ``y = A x + s e``, a mixture is a mixture again. With a factor ``S_k = F_k F_k^T`` and the
singular value decomposition ``A F_k = U diag(b) V^T``, ``r = U^T (y - A mu_k)``:

    mu_k' = mu_k + F_k V [b/(b^2 + s^2) r]
    S_k'  = F' F'^T,    F' = F_k V diag(s / sqrt(b^2 + s^2))
    log p(y | k) = log N(r; 0, b^2 + s^2),    w_k' ~ w_k p(y | k)

in which nothing cancels: ``s = 0`` is exact, and what is measured then has no variance left.

Source: Pattern Recognition and Machine Learning (Bishop, 2006), section 2.3.3.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .analytic import Mixture
from .precision import widest
from .sde.base import GaussianSDE


class CorrelatedMixture(Mixture):
    """``p(x) = sum_k w_k N(x; mu_k, S_k)`` with full covariances, over items of any shape.

    A covariance may be singular; then it has no density, but one under every SDE.

    Args:
        weights: ``(K,)``, >= 0; normalised to sum one.
        means: ``(K, *shape)``.
        covariances: of the flattened items, ``(K, D, D)``, symmetric and positive semidefinite.

    Raises:
        ValueError: for shapes that do not fit, negative weights, or matrices that are no
            covariances.
    """

    def __init__(self, weights: Any, means: Any, covariances: Any) -> None:
        means = torch.as_tensor(means)
        dims = means[0].numel()
        covariances = torch.as_tensor(covariances, device=means.device)
        if covariances.shape != (len(means), dims, dims):
            raise ValueError(
                f"covariances of shape {tuple(covariances.shape)} do not fit means of shape "
                f"{tuple(means.shape)}: ({len(means)}, {dims}, {dims})"
            )
        # In float32 a small eigenvalue would drown in the rounding of a large one.
        wide = covariances.to(widest(means.device))
        covariances = covariances if covariances.is_floating_point() else covariances.float()
        slack = 10 * dims * torch.finfo(covariances.dtype).eps * wide.abs().amax((1, 2))
        values, axes = torch.linalg.eigh((wide + wide.mT) / 2)
        if bool(((wide - wide.mT).abs().amax((1, 2)) > slack).any()):
            raise ValueError("covariances must be symmetric")
        if not bool((values >= -slack[:, None]).all()):
            raise ValueError("covariances must be positive semidefinite")
        self._fill(weights, means, axes, _resolved(values))

    @classmethod
    def of_factors(cls, weights: Any, means: Any, factors: Any) -> CorrelatedMixture:
        """The mixture of ``S_k = F_k F_k^T``, for factors ``(K, D, R)``, ``R <= D``.

        Small variances beside large ones keep all of their digits, unlike those of a covariance.
        """
        means = torch.as_tensor(means)
        factors = torch.as_tensor(factors, device=means.device).to(widest(means.device))
        dims = means[0].numel()
        if factors.ndim != 3 or factors.shape[:2] != (len(means), dims) or factors.shape[2] > dims:
            raise ValueError(
                f"factors of shape {tuple(factors.shape)} do not fit means of shape "
                f"{tuple(means.shape)}: ({len(means)}, {dims}, R) with R <= {dims}"
            )
        axes, stds, _ = torch.linalg.svd(factors)
        missing = factors.shape[1] - stds.shape[1]
        self = cls.__new__(cls)
        self._fill(weights, means, axes, pad(_resolved(stds), (0, missing)) ** 2)
        return self

    def _fill(self, weights: Any, means: Tensor, axes: Tensor, values: Tensor) -> None:
        dtype = means.dtype if means.is_floating_point() else torch.get_default_dtype()
        weights = torch.as_tensor(weights, dtype=dtype, device=means.device)
        if weights.shape != means.shape[:1]:
            raise ValueError(
                f"weights of shape {tuple(weights.shape)} do not fit "
                f"means of shape {tuple(means.shape)}: one weight a component"
            )
        if not bool((weights >= 0).all()) or not bool(weights.sum() > 0):
            raise ValueError("weights must not be negative, and not all zero")
        self.weights = weights / weights.sum()
        self.means = means.to(dtype)
        self.shape = tuple(means.shape[1:])
        self.axes = axes.to(dtype)
        """``Q_k``, a column an axis, ``(K, D, D)``."""
        self.values = values.to(dtype)
        """``l_k``, the variances along them, ``(K, D)``."""

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> CorrelatedMixture:
        """The same mixture on another device or in another dtype."""
        made = type(self).__new__(type(self))
        parts = (self.weights, self.means, self.axes, self.values)
        made._fill(*(p.to(device=device, dtype=dtype or self.means.dtype) for p in parts))
        return made

    @property
    def covariances(self) -> Tensor:
        """``S_k``, ``(K, D, D)``."""
        return self.axes * self.values[:, None] @ self.axes.mT

    def _marginal(
        self, x: Tensor, sde: GaussianSDE | None, t: float | Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if sde is None and not bool((self.values > 0).all()):
            raise ValueError("a singular covariance has no density; under an SDE it has one")
        return super()._marginal(x, sde, t)

    def _variances(self) -> Tensor:
        return self.values

    def _factors(self) -> Tensor:
        return self.axes * self.values.sqrt()[:, None]

    def _coloured(self, k: Tensor, noise: Tensor) -> Tensor:
        # A component at a time: one matrix for each draw would be large.
        flat, out = noise.flatten(1), torch.empty_like(noise.flatten(1))
        for i, factor in enumerate(self._factors()):
            out[k == i] = flat[k == i] @ factor.T
        return out.reshape(noise.shape)

    def _turned(self, x: Tensor) -> Tensor:
        return torch.einsum("bkd,kde->bke", x, self.axes)

    def _back(self, x: Tensor) -> Tensor:
        return torch.einsum("bke,kde->bkd", x, self.axes)

    def _covariance(self, share: Tensor, variances: Tensor) -> Tensor:
        return torch.einsum("bk,bke,kie,kje->bij", share, variances, self.axes, self.axes)


def _resolved(values: Tensor) -> Tensor:
    """``values (K, D)``, with zeros for what is but the rounding of the largest."""
    small = values.shape[1] * torch.finfo(values.dtype).eps * values.amax(1, keepdim=True)
    return values * (values > small)


class _Measured(NamedTuple):
    """``A F_k = U diag(b) V^T`` of all components, and the residuals of measurements."""

    factors: Tensor
    """``F_k``, ``(K, D, R)``."""
    b: Tensor
    """Singular values, ``(K, m)``, zeros where there are none."""
    v: Tensor
    """``V``, ``(K, R, R)``."""
    r: Tensor
    """``U^T (y - A mu_k)``, ``(B, K, m)``."""
    s: float
    """Standard deviation of the noise."""


def _measured(mixture: Mixture, operator: Any, y: Tensor, noise_std: float | Tensor) -> _Measured:
    s = float(noise_std)
    if not 0 <= s < math.inf:
        raise ValueError(f"noise_std must be finite and >= 0, got {s:g}")
    if tuple(operator.shape) != mixture.shape:
        raise ValueError(
            f"the operator measures items of shape {tuple(operator.shape)}, "
            f"the mixture has items of shape {mixture.shape}"
        )
    if tuple(y.shape[1:]) != tuple(operator.out):
        raise ValueError(
            f"y of shape {tuple(y.shape)} does not fit the operator: (B, *{tuple(operator.out)})"
        )
    like = mixture.means.new_empty(0, dtype=widest(mixture.means.device))
    means, factors = mixture.means.flatten(1).to(like), mixture._factors().to(like)
    unit = torch.eye(means.shape[1]).to(like).reshape(-1, *mixture.shape)
    known = operator.seen(like.new_ones((1, *operator.out))).flatten() != 0
    matrix = operator(unit).flatten(1).T[known]
    u, b, vt = torch.linalg.svd(matrix @ factors)
    residual = y.to(like).flatten(1)[:, known][:, None] - means @ matrix.T
    r = torch.einsum("bkm,kmn->bkn", residual, u)
    if s == 0:
        # Directions in which nothing is measured: the numbers there are but rounding.
        small = torch.finfo(b.dtype).eps * max(matrix.shape)
        values = torch.linalg.svdvals(matrix)
        rank = int((values > small * values[:1]).sum())
        if bool((b[:, :rank] <= small * b[:, :1]).any()):
            raise ValueError(
                "exact measurements (noise_std=0) need components with a variance in every "
                "measured direction; give a noise_std > 0"
            )
        b, r = b[:, :rank], r[..., :rank]
    return _Measured(factors, pad(b, (0, r.shape[2] - b.shape[1])), vt.mT, r, s)


def _log_evidences(mixture: Mixture, m: _Measured) -> Tensor:
    variances = m.b**2 + m.s**2
    log_norm = (variances.log() + math.log(2 * math.pi)).sum(1) / 2
    return mixture.weights.to(m.b).log() - (m.r**2 / variances).sum(2) / 2 - log_norm


def log_evidences(mixture: Mixture, operator: Any, y: Tensor, noise_std: float | Tensor) -> Tensor:
    """``log w_k p(y | k)`` over the measured entries of ``y (B, *out)``, shape ``(B, K)``."""
    return _log_evidences(mixture, _measured(mixture, operator, y, noise_std))


def condition(
    mixture: Mixture, operator: Any, y: Tensor, noise_std: float | Tensor
) -> CorrelatedMixture:
    """The posterior of ``x`` given ``y (1, *out)``, a component for each; see the module."""
    if len(y) != 1:
        raise ValueError(f"a posterior is that of one measurement (1, *out), got {len(y)} of them")
    m = _measured(mixture, operator, y, noise_std)
    count = min(m.b.shape[1], m.v.shape[2])
    b, v = m.b[:, :count], m.factors @ m.v
    gain = b / (b**2 + m.s**2) * m.r[0, :, :count]
    mean = mixture.means.flatten(1).to(b) + (v[..., :count] @ gain[..., None])[..., 0]
    left = torch.ones_like(v[:, 0])
    left[:, :count] = m.s / torch.hypot(b, torch.full_like(b, m.s))
    weights = torch.softmax(_log_evidences(mixture, m)[0], 0)
    found = CorrelatedMixture.of_factors(
        weights, mean.reshape(mixture.means.shape), v * left[:, None]
    )
    return found.to(dtype=mixture.means.dtype)


__all__ = ["CorrelatedMixture", "condition", "log_evidences"]
