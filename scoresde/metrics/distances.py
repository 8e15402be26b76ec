r"""Distances between two sets of items of any shape, taken as flat vectors ``x`` of ``D`` entries.

Sliced Wasserstein-2 averages the exact one-dimensional distance over directions:

    SW2(P, Q)^2 = E_theta W2(theta.P, theta.Q)^2,    theta uniform on the unit sphere of R^D
    W2(P, Q)^2 = int_0^1 (F_P^-1(u) - F_Q^-1(u))^2 du        in one dimension

A shift of every entry by ``c`` has ``SW2 = c`` in any dimension: it reads in units of the data.

The squared maximum mean discrepancy compares mean embeddings under a kernel, without bias:

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y),    x != x', y != y'

Both carry sampling noise: for sets of one distribution SW2 is positive and MMD^2 has mean zero.
The noise floor is what real items reach among themselves: the 95 % quantile over random splits of
real items into sets of the same two sizes. A value above it tells the samples from real items at
the 5 % level; one below it does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SPLITS = 100
QUANTILE = 0.95


class Distance(NamedTuple):
    """A distance and its standard error; what the error covers is said by the metric."""

    value: float
    stderr: float


def wasserstein2(x: Tensor, y: Tensor) -> Tensor:
    """Exact Wasserstein-2 distance of one-dimensional sets, along the last axis.

        W2^2 = int_0^1 (F_x^-1(u) - F_y^-1(u))^2 du

    The quantile functions are steps; the integral is summed over their common steps, so it is
    exact for unequal counts too.

    Args:
        x: ``(..., n)``.
        y: ``(..., m)``.

    Returns:
        ``(...)``.

    Source: Computational Optimal Transport (Peyré & Cuturi, 2019), remark 2.30,
    https://arxiv.org/abs/1803.00567.
    """
    return _sorted_square(x.sort(-1).values, y.sort(-1).values).sqrt()


@dataclass(frozen=True)
class SlicedWasserstein:
    """Sliced Wasserstein-2 distance over seeded random directions; in one dimension, exact W2.

    Args:
        projections: number of directions, >= 2.
        seed: of the directions; the same seed gives the same ones for every set.

    Source: Sliced and Radon Wasserstein Barycenters of Measures (Bonneel et al., 2015),
    https://doi.org/10.1007/s10851-014-0506-3.
    """

    projections: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.projections < 2:
            raise ValueError(f"SlicedWasserstein needs projections >= 2, got {self.projections}")

    def __call__(self, x: Tensor, y: Tensor, profile: Tensor | None = None) -> Distance:
        """``SW2`` of ``x (N, *shape)`` and ``y (M, *shape)``, in units of the items.

        The standard error is that of the choice of directions alone; the error of the items is
        the business of :meth:`floor`. ``profile`` is :meth:`profile` of ``y``, where it is known.

        Raises:
            ValueError: sets of other shapes, empty or not finite.
        """
        x, y = _flat(x, y)
        squares = _sorted_square(self.profile(x), self.profile(y) if profile is None else profile)
        value = float(squares.mean().sqrt())
        if len(squares) == 1 or value == 0:
            return Distance(value, 0.0)
        # d sqrt(s) = ds / (2 sqrt(s))
        return Distance(value, float(squares.std()) / math.sqrt(len(squares)) / (2 * value))

    def floor(
        self, real: Tensor, reference: Tensor, *, splits: int = SPLITS, seed: int = 0
    ) -> float:
        """95 % quantile of ``SW2`` over random splits of real items into ``N`` and ``M``.

        Args:
            real: ``(N, *shape)`` real items, as many as the samples to be judged.
            reference: ``(M, *shape)`` real items, those that samples are compared to.
            splits: number of random splits.
            seed: of the splits.
        """
        real, reference = _flat(real, reference)
        pool = torch.cat([real, reference])
        n, m = len(real), len(reference)
        totals = torch.zeros(splits, dtype=pool.dtype)
        directions = self._directions(pool.shape[1])
        for d in directions.split(32):
            # Sorted once: the members of a split keep their order.
            found = (d @ pool.T).sort(-1)
            values, order = found.values.numpy(), found.indices.numpy()
            for i, first in enumerate(_splits(n, m, splits, seed)):
                chosen = first.numpy()[order]  # numpy takes masks twice as fast as torch
                parts = values[chosen].reshape(-1, n), values[~chosen].reshape(-1, m)
                totals[i] += _sorted_square(*map(torch.from_numpy, parts)).sum()
        return float((totals / len(directions)).sqrt().quantile(QUANTILE))

    def profile(self, x: Tensor) -> Tensor:
        """The sorted projections of ``x (N, *shape)`` on every direction, ``(P, N)``."""
        x, _ = _flat(x, x)
        # numpy sorts several times faster than torch on a CPU.
        return torch.from_numpy(np.sort((self._directions(x.shape[1]) @ x.T).numpy(), axis=-1))

    def _directions(self, dims: int) -> Tensor:
        if dims == 1:
            return torch.ones(1, 1, dtype=torch.float64)
        generator = torch.Generator().manual_seed(self.seed)
        d = torch.randn(self.projections, dims, generator=generator, dtype=torch.float64)
        return d / d.norm(dim=1, keepdim=True)


@dataclass(frozen=True)
class MMD:
    """Unbiased squared maximum mean discrepancy with a mixture of rational-quadratic kernels.

        k(x, y) = mean_a (1 + |x - y|^2 / (2 a scale^2))^-a,    a in {0.2, 0.5, 1, 2, 5}

    ``k`` is 1 at no distance, so that ``MMD^2`` lies between about 0 (equal) and 2.

    Args:
        scale: length of the kernel, > 0; :meth:`fit` takes the median distance of a reference.
        limit: at most so many items of each set are used, since the cost is quadratic.

    Sources: A Kernel Two-Sample Test (Gretton et al., 2012), lemma 6,
    https://jmlr.org/papers/v13/gretton12a.html; the kernel of Demystifying MMD GANs (Bińkowski
    et al., 2018), https://arxiv.org/abs/1801.01401.
    """

    scale: float
    limit: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"MMD needs a positive finite scale, got {self.scale}")
        if self.limit < 2:
            raise ValueError(f"MMD needs limit >= 2, got {self.limit}")

    @classmethod
    def fit(cls, reference: Tensor, limit: int = 1000) -> MMD:
        """The metric whose scale is the median distance between two items of ``reference``.

        Raises:
            ValueError: if most of the items are the same, or there are fewer than two.
        """
        flat = reference[:limit].detach().cpu().double().flatten(1)
        if len(flat) < 2:
            raise ValueError(f"MMD needs at least two reference items, got {len(flat)}")
        return cls(float(torch.pdist(flat).median()), limit)

    def __call__(self, x: Tensor, y: Tensor, profile: Tensor | None = None) -> Distance:
        """``MMD^2`` of ``x (N, *shape)`` and ``y (M, *shape)``; it may be negative.

        The standard error is the first-order one over both sets of items, from the variances of
        ``2 (E k(x, x') - E k(x, y))`` over ``x`` and of its counterpart over ``y``. ``profile``
        is :meth:`profile` of ``y``, where it is known.

        Raises:
            ValueError: sets of other shapes, of fewer than two items, or not finite.
        """
        x, y = _flat(x[: self.limit], y[: self.limit])
        n, m = len(x), len(y)
        if min(n, m) < 2:
            raise ValueError(f"MMD^2 needs at least two items in each set, got {n} and {m}")
        across = self.kernel(x, y)
        of_x = self.profile(x)
        of_y = self.profile(y) if profile is None else profile
        value = of_x.mean() + of_y.mean() - 2 * across.mean()
        variance = (of_x - across.mean(1)).var() / n + (of_y - across.mean(0)).var() / m
        return Distance(float(value), 2 * float(variance.sqrt()))

    def floor(
        self, real: Tensor, reference: Tensor, *, splits: int = SPLITS, seed: int = 0
    ) -> float:
        """95 % quantile of ``MMD^2`` over random splits of real items into ``N`` and ``M``.

        Args:
            real: ``(N, *shape)`` real items, as many as the samples to be judged.
            reference: ``(M, *shape)`` real items, those that samples are compared to.
            splits: number of random splits.
            seed: of the splits.
        """
        real, reference = _flat(real[: self.limit], reference[: self.limit])
        pool = torch.cat([real, reference])
        n, m = len(real), len(reference)
        if min(n, m) < 2:
            raise ValueError(f"MMD^2 needs at least two items in each set, got {n} and {m}")
        kernel = self.kernel(pool, pool)
        a = torch.stack(list(_splits(n, m, splits, seed)), 1).double()  # a column a split
        ka = kernel @ a
        kb = kernel.sum(1, keepdim=True) - ka
        within = ((a * ka).sum(0) - n) / (n * (n - 1))
        within += (((1 - a) * kb).sum(0) - m) / (m * (m - 1))
        return float((within - 2 * (a * kb).sum(0) / (n * m)).quantile(QUANTILE))

    def profile(self, x: Tensor) -> Tensor:
        """``mean_x' k(x, x')`` over the other items of ``x (N, *shape)``, shape ``(N,)``."""
        x, _ = _flat(x[: self.limit], x[: self.limit])
        return (self.kernel(x, x).sum(1) - 1) / (len(x) - 1)

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """``k(x_i, y_j)`` of ``(N, D)`` and ``(M, D)``, shape ``(N, M)``."""
        rows = []
        for part in x.split(256):
            square = torch.cdist(part, y).square_().div_(2 * self.scale**2)
            # Whole and half powers are far cheaper than logarithms.
            total = (square * 5).log1p_().mul_(-0.2).exp_()
            total += (square * 2).add_(1).rsqrt_()
            total += (square + 1).reciprocal_()
            total += (square / 2).add_(1).square_().reciprocal_()
            fifth = (square / 5).add_(1)
            total += (fifth.square().square_() * fifth).reciprocal_()
            rows.append(total)
        return torch.cat(rows) / 5


def _sorted_square(x: Tensor, y: Tensor) -> Tensor:
    """``W2^2`` along the last axis of sorted ``(..., n)`` and ``(..., m)``."""
    n, m = x.shape[-1], y.shape[-1]
    if n == m:
        return (x - y).square().mean(-1)
    # Where either quantile function steps, in whole units of 1/(n m).
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    width = ends.diff(prepend=ends.new_zeros(1)).to(x.dtype) / (n * m)
    gap = x[..., (ends - 1) // m] - y[..., (ends - 1) // n]
    return (width * gap.square()).sum(-1)


def _flat(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets as ``(N, D)`` in float64 on the CPU, where every machine has float64."""
    if x.shape[1:] != y.shape[1:] or x.ndim < 2:
        raise ValueError(
            f"a distance needs two sets (N, *shape) of items of one shape, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not x.numel() or not y.numel():
        raise ValueError("a distance needs at least one item in each set")
    x, y = (v.detach().cpu().double().flatten(1) for v in (x, y))
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("a distance needs finite items")
    return x, y


def _splits(n: int, m: int, count: int, seed: int) -> Iterator[Tensor]:
    """Random choices of ``n`` out of ``n + m``, as masks."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randperm(n + m, generator=generator) < n
