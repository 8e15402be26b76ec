r"""Densities that end the integral: the prior, or a Gaussian with the moments of the data.

Under a Gaussian process the marginal at ``t`` has mean ``alpha m`` and covariance ``alpha^2 S +
sigma^2 I``, whatever the data of mean ``m`` and covariance ``S``. The Gaussian of those moments in
place of the prior ``N(0, tau^2 I)`` removes the prior's mismatch but for what is of third order in
``alpha/sigma``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..precision import widest
from ..sde.base import GaussianSDE

Terminal = tuple[Tensor, Tensor]
"""Mean, broadcastable to an item's shape, and standard deviations likewise, or the covariance
``(D, D)`` of the flattened item; of the data in model range."""


def terminal_log_prob(sde: GaussianSDE, z: Tensor, t: float, terminal: Terminal | None) -> Tensor:
    """Log-density at ``t`` of the prior, or of the moment-matched Gaussian, shape ``(B,)``.

    Raises:
        ValueError: for moments that do not fit the items.
    """
    if terminal is None:
        return sde.prior_log_prob(z)
    shape, dims = tuple(z.shape[1:]), z[0].numel()
    mean, spread = (torch.as_tensor(m, device=z.device) for m in terminal)
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    try:
        centred = z - alpha * mean.to(z).expand(shape)
        if spread.shape == (dims, dims):
            return _full(centred.flatten(1), spread, alpha, sigma)
        spread = spread.to(z).expand(shape)
    except RuntimeError as error:
        raise ValueError(
            f"terminal moments of shapes {tuple(mean.shape)} and {tuple(spread.shape)} do not fit "
            f"items of shape {shape}: a mean, and standard deviations or a covariance (D, D)"
        ) from error
    scale = (alpha**2 * spread**2 + sigma**2).sqrt()
    log_density = -((centred / scale) ** 2) / 2 - scale.log() - math.log(2 * math.pi) / 2
    return log_density.flatten(1).sum(1)


def _full(centred: Tensor, covariance: Tensor, alpha: float, sigma: float) -> Tensor:
    """``log N(centred; 0, alpha^2 S + sigma^2 I)``, the factor in the widest dtype."""
    precise = covariance.to(widest(centred.device))
    noise = sigma**2 * torch.eye(len(precise), dtype=precise.dtype, device=precise.device)
    factor, failed = torch.linalg.cholesky_ex(alpha**2 * precise + noise)
    if bool(failed):
        raise ValueError("the terminal covariance is not positive semi-definite")
    white = torch.linalg.solve_triangular(factor, centred.to(precise).T, upper=False)
    constant = factor.diagonal().log().sum() + len(factor) * math.log(2 * math.pi) / 2
    return (-white.square().sum(0) / 2 - constant).to(centred)
