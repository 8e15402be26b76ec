"""What tests of the solvers that keep to a measurement share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import scoresde as sd
from scoresde.inverse import operators as room

POINT = torch.tensor([[0.7, -1.2, 0.4, -0.5]], dtype=torch.float64)
VALUES = torch.tensor([2.0, 1.0, 0.2, 0.0], dtype=torch.float64)
"""Singular values of :func:`turned`."""
LAWS = {"vp": sd.VP, "ve": sd.VE, "linear": sd.Linear}


def rotation(size: int = 4, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0]


def turned() -> tuple[room.Linear, Tensor]:
    """An operator of 4 numbers with the singular values ``VALUES``, and its ``V``."""
    u, v = rotation(seed=5), rotation()
    return room.Linear(u @ torch.diag(VALUES) @ v.T), v


def nothing(size: int = 2) -> room.Linear:
    """An operator that measures nothing."""
    return room.Linear(torch.zeros(1, size).double())


def point(sde: sd.GaussianSDE, x0: Tensor = POINT) -> sd.analytic.MixtureScore:
    """The score of data that are one point, for which ancestral steps of any size are exact."""
    return sd.GaussianMixture([1.0], x0, [1e-6]).score(sde)


def levels(sde: sd.GaussianSDE, t: float) -> tuple[float, float]:
    return float(sde.alpha(t)), float(sde.sigma(t))


def measured(noise_std: float) -> tuple[room.Linear, Tensor, Tensor]:
    """:func:`turned`, its ``V``, and a measurement of ``POINT`` with some noise."""
    operator, v = turned()
    noise = torch.tensor([[0.8, -1.1, 0.5, 0.0]], dtype=torch.float64)
    return operator, v, operator(POINT) + noise_std * noise


def follows_the_law(sde: sd.GaussianSDE, t: float, x: Tensor, noise_std: float) -> list[bool]:
    """Fails unless states at ``t`` have the law of the process, given the data and ``y``.

    With ``m`` and ``tau`` of :func:`measured`: above ``tau`` a coefficient is ``m`` with more
    noise, below it a Brownian bridge in ``q^2`` from the data to ``m``.

    Returns:
        Which coefficients are above.
    """
    operator, v, y = measured(noise_std)
    m, x0 = (operator.pinv(y) @ v)[0], (POINT @ v)[0]
    tau = torch.where(VALUES > 0, noise_std / VALUES, math.inf)
    alpha, sigma = levels(sde, t)
    q2 = (sigma / alpha) ** 2
    above = q2 >= tau**2
    share = torch.where(above, 0, q2 / tau**2)
    mean = torch.where(above, m, x0 + share * (m - x0))
    power = torch.where(above, q2 - tau**2, q2 * (1 - share))
    close_to(x @ v, alpha * mean, alpha * power.clamp_min(0).sqrt())
    return above.tolist()


def close_to(c: Tensor, mean: Tensor, std: Tensor) -> None:
    """Fails unless the columns of ``c (N, D)`` have the mean and the standard deviation."""
    n = len(c)
    off = (c.mean(0) - mean).abs() / (std / n**0.5).clamp_min(1e-9)
    assert bool((off < 4.5).all()), (c.mean(0), mean, std)
    spread = (c.std(0) - std).abs() / (std / (2 * n) ** 0.5).clamp_min(1e-5)
    assert bool((spread < 4.5).all()), (c.std(0), std)
