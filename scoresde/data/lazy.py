"""A set that is read when it is needed: a `Source` of any size, by workers or in this process.

The order of the items is decided here and only the reading is shared out, so that a batch is the
same however many workers there are. An item that cannot be read is replaced by the next that can
be, in the order of the set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.data.batches import Batches
from scoresde.data.dataset import Dataset, level_dtype, spread
from scoresde.data.items import MIB, Items
from scoresde.data.source import Batch, DataError, Loader, Share, UnreadableError
from scoresde.data.workers import Failed, Workers

BLOCK = 256  # items read at a time where all are wanted
AT_LEAST = 64  # items of a probe, whatever their size


class Read(NamedTuple):
    """What reading gave: items, their names, and what was unreadable (number, message)."""

    x: Tensor
    y: Tensor | None
    where: tuple[str, ...]
    bad: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, eq=False)
class LazySource:
    """Some of the items of a split, in an order, read when they are needed.

    Args:
        items: all of them.
        index: which, `(N,)`, int64.
        unreadable: how many different items may be replaced; 0 for none.
        memory: bytes that a probe may take as float64.
        class_names: those of `items`, or more.
        notes: what to say once of how other items were read; the first batch carries it.
    """

    items: Items
    index: Tensor
    unreadable: int = 10
    memory: int = 512 * MIB
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", self.class_names or self.items.class_names)

    @property
    def name(self) -> str:
        """What the data is called in reports."""
        return self.items.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one item."""
        return self.items.shape

    @property
    def levels(self) -> int | None:
        """Number of discrete levels; None for continuous data."""
        return self.items.levels

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None without labels."""
        return None if self.class_names is None else len(self.class_names)

    @property
    def vectors(self) -> int | None:
        """Dimension d of the vectors that condition the items; None without any."""
        return self.items.vectors

    @property
    def size(self) -> int:
        """Number of items."""
        return len(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def in_colour(self) -> LazySource:
        """The same items with three channels, where grey was only a guess."""
        return replace(self, items=self.items.in_colour())

    def subset(self, indices: Tensor) -> LazySource:
        """The items at `indices`, in that order."""
        return replace(self, index=self.index[indices])

    def probe(self, n: int) -> Tensor:
        """At most `n` raw items, `(m, *shape)`, spread over the data, for its moments.

        Fewer of large items: in float64 they fit the memory that was granted.
        """
        room = max(AT_LEAST, self.memory // (8 * math.prod(self.shape)))
        return self.subset(spread(len(self), min(n, room))).load().x

    def loader(
        self, share: Share, step: int = 0, state: Mapping[str, Any] | None = None
    ) -> Loader:
        """Batches from that of `step` on, read by `share.workers` processes."""
        return LazyLoader(self, share, step)

    def read(self, positions: Sequence[int]) -> Read:
        """The items at `positions` of the order, or those that stand in for them.

        Raises:
            DataError: more than `unreadable` in a row cannot be read, or one does not fit.
        """
        rows = self.index[torch.as_tensor(positions)].tolist()
        try:
            x, y = self.items.read(rows)
            return Read(x, y, tuple(map(self.items.where, rows)))
        except UnreadableError:
            bad: dict[int, str] = {}
            found = [self._readable(p, bad) for p in positions]
        y = None if found[0].y is None else torch.cat([f.y for f in found if f.y is not None])
        where = tuple(name for f in found for name in f.where)
        return Read(torch.cat([f.x for f in found]), y, where, tuple(bad.items()))

    def _readable(self, position: int, bad: dict[int, str]) -> Read:
        failed: dict[int, str] = {}
        for k in range(min(self.unreadable + 1, len(self))):
            at = (position + k) % len(self)
            row = int(self.index[at])
            try:
                x, y = self.items.read([row])
            except UnreadableError as error:
                failed[at] = str(error)
                continue
            here = self.items.where(row)
            bad |= {p: f"{message}; {here} stands in for it" for p, message in failed.items()}
            return Read(x, y, (here,))
        raise too_many(list(failed.values())[-1], self.unreadable)

    def load(self, stand_ins: bool = True) -> Dataset:
        """All of the items in memory; without `stand_ins` those that cannot be read are left out.

        Raises:
            DataError: more than `unreadable` cannot be read, or items do not fit each other.
        """
        dtype = torch.float32 if self.levels is None else level_dtype(self.levels)
        x = torch.empty(len(self), *self.shape, dtype=dtype)
        labels: list[Tensor] = []
        bad: dict[int, str] = {}
        first = ""  # the name of an item with values that are not finite
        for positions in torch.arange(len(self)).split(BLOCK):
            read = self.read(positions.tolist())
            x[positions] = read.x
            finite = read.x.isfinite().flatten(1).all(1) if read.x.is_floating_point() else None
            if not first and finite is not None and not finite.all():
                first = read.where[int((~finite).nonzero()[0])]
            labels += [] if read.y is None else [read.y]
            bad |= dict(read.bad)
            if len(bad) > self.unreadable:
                raise too_many(list(bad.values())[-1], self.unreadable)
        if first:
            raise DataError(
                f"{self.name}: {int((~x.isfinite()).sum())} of {x.numel()} values are not finite "
                f"in float32, the first in {first}; remove or replace them"
            )
        y = torch.cat(labels) if labels else None
        if bad and not stand_ins:
            kept = torch.ones(len(self), dtype=torch.bool)
            kept[list(bad)] = False
            x, y = x[kept], None if y is None else y[kept]
            bad = {
                p: message.rsplit("; ", 1)[0] + "; it is left out" for p, message in bad.items()
            }
        return Dataset(x, y, self.levels, self.name, self.class_names, tuple(bad.values()))


def too_many(message: str, unreadable: int) -> DataError:
    """More items than `unreadable` cannot be read; `message` is of the last of them."""
    if unreadable == 0:
        return DataError(message)
    return DataError(f"more than {unreadable} items cannot be read, the last: {message}")


class LazyLoader(Loader):
    """Batches of a `LazySource`.

    Args:
        context: how workers are started ("fork", "spawn", "forkserver"); None for the default.
    """

    def __init__(
        self, source: LazySource, share: Share, step: int = 0, context: str | None = None
    ) -> None:
        self._source, self._share, self._step = source, share, step
        self._batches = Batches(len(source), share.batch, share.seed)
        self._named: set[int] = set()
        self._notes = list(source.notes)
        self._workers: Workers[Read] = Workers(source.name, self._reading, share.workers, context)

    def __next__(self) -> Batch:
        notes, self._notes = self._notes, []
        if self._share.workers:
            read = self._workers.next(f"the batch of step {self._step}", notes)
        else:
            read = self._source.read(self._positions(self._step))
        for position, message in read.bad:
            if position not in self._named:
                self._named.add(position)
                notes.append(message)
                if len(self._named) > self._source.unreadable:
                    raise too_many(message, self._source.unreadable)
        self._step += 1
        return Batch(read.x, read.y, read.where, tuple(notes))

    def _positions(self, step: int) -> list[int]:
        first = self._share.start
        return self._batches.indices(step)[first : first + self._share.local].tolist()

    def _reading(self) -> tuple[_Reading, _Plan]:
        return _Reading(self._source), _Plan(self, self._step)

    def close(self) -> None:
        """Ends the workers; a next batch would start them again."""
        self._workers.close()


@dataclass(frozen=True)
class _Plan:
    """Which items to read, step by step without end."""

    loader: LazyLoader
    step: int

    def __iter__(self) -> Iterator[list[int]]:
        return (self.loader._positions(step) for step in count(self.step))


@dataclass(frozen=True)
class _Reading:
    """What a worker does; a DataError comes back as its line, not as a traceback."""

    source: LazySource

    def __getitem__(self, positions: list[int]) -> Read | Failed:
        try:
            return self.source.read(positions)
        except DataError as error:
            return Failed(str(error))
