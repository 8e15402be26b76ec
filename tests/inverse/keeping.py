"""What tests of the solvers that keep to a measurement share."""

from __future__ import annotations

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


def close_to(c: Tensor, mean: Tensor, std: Tensor) -> None:
    """Fails unless the columns of ``c (N, D)`` have the mean and the standard deviation."""
    n = len(c)
    off = (c.mean(0) - mean).abs() / (std / n**0.5).clamp_min(1e-9)
    assert bool((off < 4.5).all()), (c.mean(0), mean, std)
    spread = (c.std(0) - std).abs() / (std / (2 * n) ** 0.5).clamp_min(1e-5)
    assert bool((spread < 4.5).all()), (c.std(0), std)
