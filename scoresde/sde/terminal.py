r"""What is left of the data at ``t_max``, and end values chosen so that little enough is.

For data with per-entry mean ``m`` and variance ``v``, the marginal at ``t_max`` has mean
``alpha m`` and variance ``alpha^2 v + sigma^2``; against the prior ``N(0, tau^2)``

    KL = 1/2 sum [ r + (alpha m/tau)^2 - 1 - log r ],   r = (alpha^2 v + sigma^2)/tau^2
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .base import GaussianSDE


class Remains(NamedTuple):
    """Signal that survives the forward process.

    ``snr`` is the power ratio ``alpha^2 E|x|^2 / (D sigma^2)``, ``kl`` the divergence of the
    marginal from the prior in nats an item, the marginal taken as a Gaussian of its moments.
    """

    snr: float
    kl: float


def remains(sde: GaussianSDE, mean: Tensor, variance: Tensor) -> Remains:
    """What is left at ``t_max`` of data with these per-entry moments (any shape, one item)."""
    mean, variance = mean.double(), variance.double()
    alpha2, sigma2 = float(sde.alpha(sde.t_max)) ** 2, float(sde.sigma(sde.t_max)) ** 2
    ratio = (alpha2 * variance + sigma2) / sde.prior_std**2
    kl = (ratio + alpha2 * mean**2 / sde.prior_std**2 - 1 - ratio.log()).sum() / 2
    return Remains(float(alpha2 * (variance + mean**2).mean() / sigma2), float(kl))


def auto_sigma_max(x: Tensor, limit: int = 2000) -> float:
    """The largest distance between two items of ``x (N, *shape)``, over at most ``limit`` items.

    Source: Improved Techniques for Training Score-Based Generative Models (Song & Ermon, 2020),
    technique 1, https://arxiv.org/abs/2006.09011.
    """
    flat = x[:limit].flatten(1).float()
    return float(torch.cdist(flat, flat).max())


def auto_beta_max(
    make: Callable[[float], GaussianSDE], mean: Tensor, variance: Tensor, kl: float = 0.01
) -> float:
    """The smallest ``beta_max`` at which at most ``kl`` nats an item are left at ``t_max``.

    Args:
        make: the process with a given ``beta_max``.
        mean: per-entry mean of the data.
        variance: per-entry variance of the data.
        kl: accepted divergence from the prior.
    """
    low, high = 1.0, 1000.0
    if remains(make(high), mean, variance).kl > kl:
        raise ValueError(f"no beta_max up to {high:g} leaves {kl} nats or less at t_max")
    for _ in range(60):
        mid = math.sqrt(low * high)
        enough = remains(make(mid), mean, variance).kl <= kl
        low, high = (low, mid) if enough else (mid, high)
    return high
