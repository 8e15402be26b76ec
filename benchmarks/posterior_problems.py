"""Inverse problems whose posteriors are exact, and distances of samples from them.

Data are mixtures of zero mean and unit variance, so that what methods assume of data at large is
right. *ring*: eight modes on a circle, of which one number is measured. *random*: twenty-five
modes in eight dimensions, three numbers by a random matrix. *picture*: four patterns of 6 x 6 with
smooth variations, of which the left third is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

import scoresde as sd
from scoresde.metrics import SlicedWasserstein

f64 = torch.float64
REFERENCE = 4000
"""Exact samples that those of a method are compared to, by the sliced distance."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A law, what is measured of it, and how far samples are from a posterior.

    Args:
        name: of the law.
        mixture: the law.
        operator: what is measured.
        noise_std: of the measurement.
        exact: whether the distance is W2 by optimal assignment; else sliced W2.
    """

    name: str
    mixture: sd.GaussianMixture | sd.CorrelatedMixture
    operator: sd.inverse.Operator
    noise_std: float
    exact: bool

    @property
    def title(self) -> str:
        """Name and noise."""
        return f"{self.name}, noise {self.noise_std:g}"

    def measurements(self, draws: int, seed: int) -> Tensor:
        """Of items of the law, ``(draws, *out)``."""
        generator = torch.Generator().manual_seed(seed)
        x0 = self.mixture.sample(draws, generator)
        return self.operator.measure(x0, self.noise_std, seed=seed)


class Judge:
    """The posteriors of some measurements, and figures of samples beside them."""

    def __init__(self, problem: Problem, y: Tensor, n: int, seed: int) -> None:
        self.problem, self.n = problem, n
        self.posteriors = [
            problem.mixture.posterior(problem.operator, one[None], problem.noise_std) for one in y
        ]
        self.moments = [p.moments() for p in self.posteriors]
        generator = torch.Generator().manual_seed(1000 + seed)
        count = n if problem.exact else REFERENCE
        self.references = [p.sample(count, generator).flatten(1) for p in self.posteriors]
        self.sliced = SlicedWasserstein(projections=128)
        self.profiles = [
            None if problem.exact else self.sliced.profile(r) for r in self.references
        ]
        found = [self(torch.cat([p.sample(n, generator) for p in self.posteriors])) for _ in "123"]
        self.floor = [sum(f["w2"][i] for f in found) / 3 for i in range(len(y))]
        """What exact samples reach, for each measurement."""
        self.floor_of_mean = sum(f["mean"] for f in found) / 3

    def distance(self, x: Tensor, i: int) -> float:
        """W2 of flat samples ``(n, D)`` from the posterior ``i``; infinite if they are."""
        if not bool(x.isfinite().all()):
            return math.inf
        reference = self.references[i]
        if not self.problem.exact:
            return self.sliced(x, reference, self.profiles[i]).value
        square = cdist(x.numpy(), reference[: len(x)].numpy(), "sqeuclidean")
        return math.sqrt(square[linear_sum_assignment(square)].mean())

    def __call__(self, x: Tensor) -> dict:
        """Figures of samples ``(draws * n, *shape)``, those of a measurement in a row.

        ``w2`` of each measurement; ``mean``: root mean square error of the mean over entries, in
        posterior standard deviations; ``std``: mean relative error of the standard deviation.
        """
        w2, mean, std = [], [], []
        for i, part in enumerate(x.flatten(1).chunk(len(self.posteriors))):
            exact_mean, covariance = self.moments[i]
            spread = covariance.diagonal().sqrt()
            w2.append(self.distance(part, i))
            error = (part.mean(0) - exact_mean.flatten()) / spread
            mean.append(float(error.square().mean().sqrt()))
            std.append(float((part.std(0) / spread - 1).mean()))
        return {"w2": w2, "mean": sum(mean) / len(mean), "std": sum(std) / len(std)}


def standardised(weights: Tensor, means: Tensor, factors: Tensor) -> sd.CorrelatedMixture:
    """The mixture moved and scaled to zero mean and a mean variance of one."""
    raw = sd.CorrelatedMixture.of_factors(weights, means, factors)
    mean, covariance = raw.moments()
    scale = covariance.diagonal().mean().sqrt()
    return sd.CorrelatedMixture.of_factors(weights, (means - mean) / scale, factors / scale)


def ring(noise_std: float) -> Problem:
    """Two dimensions, one number measured."""
    angle = torch.arange(8, dtype=f64) * math.pi / 4
    means = torch.stack([angle.cos(), angle.sin()], 1)
    weights = torch.tensor([1.0, 2.0, 1.0, 1.5, 1.0, 0.5, 1.0, 2.0], dtype=f64)
    across = torch.stack([-angle.sin(), angle.cos()], 1)
    factors = torch.stack([0.08 * means, 0.2 * across], 2)  # longer along the circle
    mixture = standardised(weights, means, factors)
    operator = sd.inverse.Linear(torch.tensor([[0.8, 0.6]], dtype=f64))
    return Problem("ring", mixture, operator, noise_std, True)


def random(noise_std: float) -> Problem:
    """Eight dimensions, three numbers measured."""
    generator = torch.Generator().manual_seed(8)
    means = torch.randn(25, 8, generator=generator, dtype=f64)
    stds = 0.1 + 0.3 * torch.rand(25, 8, generator=generator, dtype=f64)
    weights = 0.5 + torch.rand(25, generator=generator, dtype=f64)
    raw = sd.GaussianMixture(weights, means, stds)
    mean, covariance = raw.moments()
    scale = covariance.diagonal().mean().sqrt()
    mixture = sd.GaussianMixture(weights, (means - mean) / scale, stds / scale)
    matrix = torch.randn(3, 8, generator=generator, dtype=f64) / 8**0.5
    return Problem("random", mixture, sd.inverse.Linear(matrix), noise_std, False)


def picture(noise_std: float) -> Problem:
    """Pictures of 6 x 6, the left third known."""
    side = 6
    place = torch.linspace(0, 1, side, dtype=f64)
    grid = torch.cartesian_prod(place, place)
    generator = torch.Generator().manual_seed(6)
    waves = torch.rand(4, 2, generator=generator, dtype=f64) * 5
    phases = torch.rand(4, generator=generator, dtype=f64) * 2 * math.pi
    means = torch.cos(grid @ waves.T + phases).T
    lengths = torch.linspace(0.25, 0.7, 4, dtype=f64)
    square = torch.cdist(grid, grid) ** 2
    kernels = 0.25 * torch.exp(-square / (2 * lengths[:, None, None] ** 2))
    kernels = kernels + 0.002 * torch.eye(side**2, dtype=f64)
    mixture = standardised(torch.ones(4, dtype=f64), means, torch.linalg.cholesky(kernels))
    mixture = sd.CorrelatedMixture(
        mixture.weights, mixture.means.reshape(4, 1, side, side), mixture.covariances
    )
    mask = (torch.arange(side) < 2).expand(1, side, side)
    return Problem("picture", mixture, sd.inverse.Mask(mask), noise_std, False)


PROBLEMS = {"ring": ring, "random": random, "picture": picture}
