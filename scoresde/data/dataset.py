"""A data set: items of one shape, held in memory, checked once when it is made; a `Source`.

Discrete data (pictures of 8 bits, the digits) is kept as whole levels `0..levels-1`, so that
dequantisation happens once, in the `Scaler`, and never by accident. Everything else is float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scoresde.data.batches import Batches
from scoresde.data.source import Batch, DataError, Loader, Share

SPLITS = ("train", "test", "validation", "valid", "val")
MAX_LEVELS = 65536
MAX_CLASSES = 1_000_000


def level_dtype(levels: int) -> torch.dtype:
    """The integer type that holds levels `0..levels-1`."""
    return torch.uint8 if levels <= 256 else torch.int64


@dataclass(frozen=True, eq=False)
class Dataset:
    """Items `x` of one shape, with classes or vectors `y` where there are any.

    Args:
        x: the items, `(N, *shape)`: whole levels `0..levels-1` if `levels` is given (kept as
            uint8, or int64 above 256 levels), else floating point (kept as float32).
        y: class labels `0..K-1`, `(N,)`, int64; or vectors that condition the items, `(N, d)`,
            floating point (kept as float32).
        levels: number of discrete levels, 2 to 65536; None for continuous data.
        name: what the data is called in reports.
        class_names: one name a class; where there are labels and no names, "0", "1", ...
        notes: what to say once of how the items were read; the first batch carries it.

    Raises:
        DataError: no items, non-finite values, levels out of range, or labels that do not fit.
    """

    x: Tensor
    y: Tensor | None = None
    levels: int | None = None
    name: str = ""
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.x.ndim < 2 or self.x.numel() == 0:
            raise DataError(
                f"{self._who}: x has shape {tuple(self.x.shape)}; it must be "
                "(N, *shape) with at least one item and no empty axis"
            )
        x = self._continuous() if self.levels is None else self._discrete(self.levels)
        object.__setattr__(self, "x", x)
        if self.y is not None and self.y.is_floating_point():
            object.__setattr__(self, "y", self._vectors(self.y))
            object.__setattr__(self, "class_names", None)
        elif self.y is not None:
            y = self._labels(self.y)
            names = self.class_names or tuple(str(k) for k in range(int(y.max()) + 1))
            object.__setattr__(self, "y", y)
            object.__setattr__(self, "class_names", tuple(names))

    @property
    def _who(self) -> str:
        return self.name or "dataset"

    def _continuous(self) -> Tensor:
        if not self.x.is_floating_point():
            raise DataError(
                f"{self._who}: x is {self.x.dtype}; whole numbers need `levels`, "
                "continuous data must be floating point"
            )
        x = self.x.float()
        bad = ~x.isfinite()
        if bad.any():
            first = int(bad.flatten(1).any(1).nonzero()[0])
            raise DataError(
                f"{self._who}: {int(bad.sum())} of {x.numel()} values are not finite "
                f"in float32, the first in item {first}; remove or replace them"
            )
        return x

    def _discrete(self, levels: int) -> Tensor:
        if not 2 <= levels <= MAX_LEVELS:
            raise DataError(f"{self._who}: levels is {levels}; it must be 2 to {MAX_LEVELS}")
        if self.x.is_floating_point() or self.x.is_complex():
            raise DataError(
                f"{self._who}: x is {self.x.dtype}; data of {levels} levels must be "
                "of an integer type"
            )
        low, high = int(self.x.min()), int(self.x.max())
        if low < 0 or high >= levels:
            raise DataError(
                f"{self._who}: values run from {low} to {high}; data of {levels} "
                f"levels must lie in 0..{levels - 1}"
            )
        return self.x.to(level_dtype(levels))

    def _vectors(self, y: Tensor) -> Tensor:
        if y.ndim != 2 or len(y) != len(self.x) or not y.shape[1]:
            raise DataError(
                f"{self._who}: labels are {y.dtype} of shape {tuple(y.shape)}; they "
                f"must be integers of shape ({len(self.x)},), one an item, "
                f"or floating-point vectors ({len(self.x)}, d)"
            )
        y = y.float()
        bad = ~y.isfinite().all(1)
        if bad.any():
            raise DataError(
                f"{self._who}: the vector of item {int(bad.nonzero()[0])} is not finite"
            )
        return y

    def _labels(self, y: Tensor) -> Tensor:
        if y.shape != (len(self.x),):
            raise DataError(
                f"{self._who}: labels are {y.dtype} of shape {tuple(y.shape)}; they "
                f"must be integers of shape ({len(self.x)},), one an item, "
                f"or floating-point vectors ({len(self.x)}, d)"
            )
        count = len(self.class_names) if self.class_names else MAX_CLASSES
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= count:
            raise DataError(
                f"{self._who}: labels run from {low} to {high}; they must lie in 0..{count - 1}"
            )
        return y.long()

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one item."""
        return tuple(self.x.shape[1:])

    @property
    def num_classes(self) -> int | None:
        """The number of classes K, the same in every subset; None without labels."""
        return None if self.y is None or self.class_names is None else len(self.class_names)

    @property
    def vectors(self) -> int | None:
        """The dimension d of the vectors that condition the items; None without any."""
        return None if self.y is None or self.y.ndim == 1 else self.y.shape[1]

    @property
    def size(self) -> int:
        """The number of items."""
        return len(self)

    def probe(self, n: int) -> Tensor:
        """At most `n` items, `(m, *shape)`, spread: they may lie class by class."""
        return self.x[spread(len(self), n)]

    def loader(
        self, share: Share, step: int = 0, state: Mapping[str, Any] | None = None
    ) -> Loader:
        """Batches from that of `step` on, gathered in this process."""
        return _Gathering(self, share, step)

    def subset(self, indices: Tensor | Sequence[int]) -> Dataset:
        """The items at `indices`, in that order.

        Raises:
            DataError: no index, or one outside `0..N-1`.
        """
        index = torch.as_tensor(indices, dtype=torch.long)
        if index.ndim != 1 or not len(index) or index.min() < 0 or index.max() >= len(self):
            raise DataError(
                f"{self._who}: a subset takes one or more indices in 0..{len(self) - 1}"
            )
        return replace(self, x=self.x[index], y=None if self.y is None else self.y[index])

    def split(self, fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
        """Hold out a share of the items: `(train, heldout)`, disjoint, together all of them.

        The permutation depends on N and `seed` alone; each part has at least one item.

        Raises:
            DataError: `fraction` outside (0, 1), or fewer than two items.
        """
        if not 0 < fraction < 1:
            raise DataError(f"the held-out fraction is {fraction}; it must lie between 0 and 1")
        if len(self) < 2:
            raise DataError(f"{self._who}: one item cannot be split in two")
        train, held = split_indices(len(self), fraction, seed)
        return self.subset(train), self.subset(held)


def split_indices(n: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Which of `n` items, two or more, are trained on and which are held out, in a fixed order."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    held = min(max(round(n * fraction), 1), n - 1)
    return order[held:], order[:held]


def spread(n: int, limit: int) -> Tensor:
    """At most `limit` of the indices `0..n-1`, evenly spaced and rising."""
    kept = min(n, limit)
    return torch.arange(kept) * n // max(kept, 1)


class _Gathering(Loader):
    """Batches of a set in memory."""

    def __init__(self, data: Dataset, share: Share, step: int) -> None:
        self._data, self._share, self._step = data, share, step
        self._batches = Batches(len(data), share.batch, share.seed)
        self._notes = data.notes

    def __next__(self) -> Batch:
        first = self._share.start
        index = self._batches.indices(self._step)[first : first + self._share.local]
        self._step += 1
        notes, self._notes = self._notes, ()
        y = None if self._data.y is None else self._data.y[index]
        where = tuple(f"item {i}" for i in index.tolist())
        return Batch(self._data.x[index], y, where, notes)
