r"""One Brownian path for a sample, whatever the steps that it is followed with.

The clock of the path is the log-SNR ``u``, in which every reverse SDE has the noise
``sqrt(2) sigma dW(u)``. On ``[-32, 32]``, 64 long, the path is the Levy-Ciesielski series

    W(u) = z_0 (u + 32)/8 + sum_j z_j,n(u) sqrt(64/2^j) min(f, 1 - f),    j = 0..31

where ``n(u)`` is the dyadic interval of level j that holds ``u``, and ``f`` in [0, 1] is where in
it. The sum is what bridging midpoint after midpoint gives. Each interval's normal is keyed by
(seed, sample, level, n): the path is a fixed function, so that it may be asked in any order, for
any points, by any batch on any device, and increments of parts add up to that of the whole.

The clock ticks in units of ``2^-26`` (1.5e-8): queries are taken to the tick below, so the law of
all increments is exact, of variance one after division by the root of the ticks that they span.

Sources: Scalable Gradients for Stochastic Differential Equations (Li et al., 2020), section 4,
https://arxiv.org/abs/2001.01328, for the virtual tree; Brownian Motion and Stochastic Calculus
(Karatzas & Shreve, 1991), section 2.3, https://doi.org/10.1007/978-1-4612-0949-2, for the series.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .noise import KeyedNoise, NoiseSource, box_muller, words, workplace
from .sde.base import as_time

LOW, LENGTH, LEVELS = -32.0, 64.0, 32
TICKS = 1 << LEVELS
RESOLUTION = LENGTH / TICKS
"""Length of a tick; spans are at least as long."""
_PATH = 1 << 41  # keeps the path's normals apart from the draws of the same seed
_CHUNK = 1 << 20  # normals made at once


class PathNoise(KeyedNoise, ABC):
    """Source of noise that knows which step of the reverse SDE its normals are for."""

    @abstractmethod
    def increment(
        self,
        a: float | Tensor,
        b: float | Tensor,
        shape: tuple[int, ...],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Standard normals of ``shape = (B, ...)`` for the step from log-SNR ``a`` to ``b``."""


class BrownianPath(PathNoise):
    """Source of noise whose increments follow one path a sample; other draws are keyed.

    Args:
        seed: any integer; its low 64 bits are the key.
        start: index of the first sample of this batch.
    """

    def __init__(self, seed: int, start: int = 0) -> None:
        super().__init__(seed, start)
        self._rows: Tensor | None = None
        self._for: tuple[tuple[int, ...], torch.device] | None = None
        self._known: dict[int, tuple[int, Tensor]] = {}
        """By level, the last interval asked for and its normals: the coarse levels alone."""
        self._last: tuple[int, Tensor] | None = None
        """The last tick asked for and the path there."""

    def part(self, rows: Tensor) -> BrownianPath:
        """The paths of some samples of the batch, ``rows (b,)``."""
        part = BrownianPath(self.seed, self.start)
        part._rows = rows.cpu() if self._rows is None else self._rows[rows.cpu()]
        part.draw = self.draw
        return part

    def increment(
        self,
        a: float | Tensor,
        b: float | Tensor,
        shape: tuple[int, ...],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """``(W(b) - W(a))/sqrt(b - a)``, standard normal, of ``shape = (B, ...)``.

        Args:
            a: log-SNR, a number or one a sample, of ``B`` elements.
            b: the same, ``> a``. Values outside [-32, 32] are taken to its ends.
            shape: of the result.
            device: of the result.
            dtype: of the result.

        Raises:
            ValueError: if not ``a < b``.
        """
        a, b = as_time(a), as_time(b)
        if not bool((a < b).all()):
            raise ValueError(f"an increment needs a < b, got a={a.tolist()}, b={b.tolist()}")
        start = ticks(a).clamp_max(TICKS - 1)
        end = torch.maximum(ticks(b), start + 1)
        root = ((end - start).double() * RESOLUTION).sqrt()
        work = workplace(torch.device(device or "cpu"))
        keep = LENGTH / float(root.min()) ** 2
        here = self._at(start, shape, work, keep)
        z = (self._at(end, shape, work, keep) - here) / root.to(work)[:, None]
        return z.reshape(shape).to(device or "cpu", dtype or torch.get_default_dtype())

    def at(
        self, u: float | Tensor, shape: tuple[int, ...], device: torch.device | str | None = None
    ) -> Tensor:
        """``W(u)``, float64, of ``shape = (B, ...)``; ``u`` a number or one a sample."""
        work = workplace(torch.device(device or "cpu"))
        return self._at(ticks(as_time(u)), shape, work, 0.0).reshape(shape)

    def _at(self, k: Tensor, shape: tuple[int, ...], device: torch.device, keep: float) -> Tensor:
        """The path at the ticks ``k``, ``(1,)`` or ``(B,)``: shape ``(B, D)``.

        Normals of levels with at most ``keep`` intervals are kept for the next query of one tick,
        which is a step away and so shares most of them.
        """
        if self._for != (tuple(shape), device):
            self._for, self._known, self._last = (tuple(shape), device), {}, None
        one = len(k) == 1
        if one and self._last is not None and self._last[0] == int(k):
            return self._last[1]
        dims, count = self._dims(shape)
        nodes, weights = series(k)
        total = torch.zeros(shape[0], dims, dtype=torch.float64, device=device)
        node, known = nodes[0].tolist(), self._known if one else {}
        bends = weights.any(0).tolist()
        weights = weights.to(device)
        new = []
        for j in range(LEVELS + 1):
            if j in known and known[j][0] == node[j]:
                total.addcmul_(weights[:, j, None], known[j][1])
            elif bends[j]:
                new.append(j)
        sample = self._samples(shape[0], device)[:, None, None]
        size = max(1, _CHUNK // (shape[0] * count))
        for levels in torch.tensor(new).split(size) if new else ():
            draw = nodes[:, levels].to(device)[:, :, None]
            normals = box_muller(words(self.seed ^ _PATH, sample, draw, count))[..., :dims]
            for j, z in zip(levels.tolist(), normals.unbind(1), strict=True):
                total.addcmul_(weights[:, j, None], z)
                if one and 2 ** max(j - 1, 0) <= keep:
                    known[j] = node[j], z
        if one:
            self._last = int(k), total
        return total

    def _samples(self, batch: int, device: torch.device | None) -> Tensor:
        """Indices of the samples of this batch, ``(batch,)``."""
        if self._rows is None:
            return super()._samples(batch, device)
        return self.start + self._rows.to(device)


def ticks(u: Tensor) -> Tensor:
    """The tick at or below each ``u``, int64 on the CPU, flat."""
    place = (u.detach().cpu().double().flatten() - LOW) / RESOLUTION
    return place.clamp(0, TICKS).floor().long()


def span(a: Tensor, b: Tensor) -> Tensor:
    """The time that the path's clock counts from ``a`` to ``b``, a tick or more; ``(n,)``."""
    return (ticks(b) - ticks(a)).clamp_min(1).double() * RESOLUTION


def series(k: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and weights of the normals that make up the path at the ticks ``k (n,)``.

    Both are of shape ``(n, 33)``: the straight line to the end first, then level by level.
    """
    level = torch.arange(LEVELS)
    width = TICKS >> level  # of an interval, in ticks
    k = k[:, None]
    inside = (k % width).double() / width
    bends = (width.double() * RESOLUTION).sqrt() * torch.minimum(inside, 1 - inside)
    line = k.double() / TICKS * LENGTH**0.5
    keys = torch.cat([torch.zeros_like(k), (1 << level) + k // width], 1)
    return keys, torch.cat([line, bends], 1)


def path_of(noise: NoiseSource | None) -> PathNoise:
    """The path of a source: itself if it is one, or one with its seed and samples.

    A torch generator (the global one if None) gives the seed by a draw.
    """
    if isinstance(noise, PathNoise):
        return noise
    if isinstance(noise, KeyedNoise):
        return BrownianPath(noise.seed, noise.start)
    device = None if noise is None else noise.device
    return BrownianPath(int(torch.randint(1 << 62, (), generator=noise, device=device)))
