"""Laws whose density, moments and score under every process are known, of different difficulty.

Each has mean zero and an average variance of one, so that errors compare between them. The parts
of a mixture lie on a circle in the first two entries and anywhere in the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..analytic import GaussianMixture


@dataclass(frozen=True)
class Law(ABC):
    """A closed-form distribution of vectors.

    Args:
        dim: entries of a vector, >= 1.
    """

    dim: int

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"a law needs dim >= 1, got {self.dim}")

    @abstractmethod
    def mixture(self) -> GaussianMixture:
        """The distribution, in float64."""


@dataclass(frozen=True)
class Overlapping(Law):
    """Three unequal parts that overlap a little, each with its own deviation in each entry."""

    def mixture(self) -> GaussianMixture:
        """The distribution, in float64."""
        generator = torch.Generator().manual_seed(self.dim)
        weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        means = _circle(self.dim, 3, generator)
        stds = 0.35 + 0.25 * torch.rand(3, self.dim, generator=generator, dtype=torch.float64)
        return _standard(weights, means, stds)


@dataclass(frozen=True)
class Separated(Law):
    """Tight parts far from each other: the score turns sharply where a sample decides.

    Weights fall from part to part, to a third of the first; a solver that decides wrongly shows
    in the distances of laws. In one dimension the parts lie at equal distances on the line.

    Args:
        parts: number of parts, >= 2.
        std: standard deviation of a part in each entry, where the circle's radius is 1.5.
    """

    parts: int = 8
    std: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts < 2 or not self.std > 0:
            raise ValueError(
                f"Separated needs parts >= 2 and std > 0, got parts={self.parts}, std={self.std}"
            )

    def mixture(self) -> GaussianMixture:
        """The distribution, in float64."""
        generator = torch.Generator().manual_seed(self.dim)
        weights = torch.linspace(1, 1 / 3, self.parts, dtype=torch.float64)
        if self.dim == 1:
            means = torch.linspace(-1, 1, self.parts, dtype=torch.float64)[:, None]
        else:
            means = _circle(self.dim, self.parts, generator)
        stds = torch.full((self.parts, self.dim), self.std, dtype=torch.float64)
        return _standard(weights, means, stds)


@dataclass(frozen=True)
class Narrow(Law):
    """Two nearly degenerate parts: deviations fall geometrically over the entries.

    As with pictures, most of the variance lies in a few directions. The parts overlap in the
    widest and are apart in the narrowest ones, where a sample decides at the least noise. In one
    dimension both parts have the smallest deviation.

    Args:
        ratio: smallest standard deviation over the largest, in (0, 1].
    """

    ratio: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio <= 1:
            raise ValueError(f"Narrow needs ratio in (0, 1], got {self.ratio}")

    def mixture(self) -> GaussianMixture:
        """The distribution, in float64."""
        exponents = torch.linspace(0 if self.dim > 1 else 1, 1, self.dim, dtype=torch.float64)
        stds = self.ratio**exponents
        weights = torch.tensor([0.6, 0.4], dtype=torch.float64)
        signs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
        return _standard(weights, signs * stds.sqrt(), stds.expand(2, -1))


def mixture(dim: int = 2) -> GaussianMixture:
    """The mixture that benchmarks use when none is named: :class:`Overlapping`.

    Raises:
        ValueError: if ``dim < 1``.
    """
    return Overlapping(dim).mixture()


def _circle(dim: int, parts: int, generator: torch.Generator) -> Tensor:
    """Means ``(parts, dim)`` on a circle of radius 1.5, normal beyond the first two entries."""
    angles = 0.5 + torch.linspace(0, 2, parts + 1, dtype=torch.float64)[:parts] * torch.pi
    means = torch.randn(parts, dim, generator=generator, dtype=torch.float64)
    means[:, 0] = 1.5 * angles.cos()
    if dim > 1:
        means[:, 1] = 1.5 * angles.sin()
    return means


def _standard(weights: Tensor, means: Tensor, stds: Tensor) -> GaussianMixture:
    """The mixture moved to mean zero and scaled to an average variance of one."""
    weights = weights / weights.sum()
    means = means - weights @ means
    size = (weights @ (means**2 + stds**2)).mean().sqrt()
    return GaussianMixture(weights, means / size, stds / size)


__all__ = ["Law", "Narrow", "Overlapping", "Separated"]
