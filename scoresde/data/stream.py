"""The order of a stream: lanes that read shards, and shuffle the records block by block.

A run of `world` processes with `workers` readers each has `world * workers` lanes. In every pass
the shards are permuted and each lane reads its own, `shards[lane::lanes]`; where there are fewer
shards than lanes, each lane reads all of them and keeps the records `lane::lanes`. A lane cuts
what it reads into blocks of `buffer` records and permutes each. All permutations are functions of
the seed, the pass, the lane and the block, so that a place in a stream is a few numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.data.lazy import too_many
from scoresde.data.shards import Cursor, DamagedError, Shards
from scoresde.data.source import DataError, UnreadableError
from scoresde.data.stream_items import Form, Item, Record
from scoresde.noise import step_seed

BARREN = 100  # passes, or blocks, without anything of use before a lane gives up


class Position(NamedTuple):
    """A place in a lane: where its block begins, and how much of it is used.

    Args:
        epoch: number of the pass, from 0.
        place: which of the shards of the pass, in the lane's order.
        at: where in that shard, as its cursor says; None for its start.
        seen: records read of this pass, also those of other lanes.
        block: number of the block in this pass.
        used: records handed out since the block began; it may run past its end.
    """

    epoch: int = 0
    place: int = 0
    at: Any = None
    seen: int = 0
    block: int = 0
    used: int = 0


@dataclass(frozen=True)
class Order:
    """What decides the order of a lane.

    Args:
        lane: its number, `0..lanes-1`.
        lanes: how many there are.
        buffer: records of a block.
        seed: of all permutations.
        held: records at the head of the first shard that are held out.
    """

    lane: int
    lanes: int
    buffer: int
    seed: int
    held: int = 0

    def shards(self, epoch: int, count: int) -> list[int]:
        """The shards of a pass, of `count`, in the order of reading."""
        order = _permutation(count, step_seed(self.seed, epoch, stream=16))
        return order[self.lane :: self.lanes] if self.by_shards(count) else order

    def by_shards(self, count: int) -> bool:
        """Whether `count` shards are shared out whole."""
        return count >= self.lanes

    def block(self, epoch: int, block: int, count: int) -> list[int]:
        """The permutation of a block of `count` records."""
        seed = step_seed(self.seed, epoch, stream=17)
        return _permutation(count, step_seed(seed, block, stream=18 + self.lane))


def _permutation(n: int, seed: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


class Portion(NamedTuple):
    """Items of a lane: a `Batch` with the position after it.

    Args:
        x: raw items, `(n, *shape)`.
        y: classes or vectors, or None.
        where: one name an item.
        position: of the lane, after these items.
        bad: what was unreadable: names and messages.
        notes: of damaged shards.
    """

    x: Tensor
    y: Tensor | None
    where: tuple[str, ...]
    position: Position
    bad: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


class Lane:
    """One reader of a stream, from a position on.

    Args:
        shards: all of them.
        order: of this lane.
        position: where to go on.
    """

    def __init__(self, shards: Shards, order: Order, position: Position) -> None:
        self._shards, self._order = shards, order
        self._next = position._replace(used=0)  # where the next block begins
        self._begun = self._next  # where the block in use began
        self._cursor: Cursor | None = None
        self._block: list[Record] = []
        self._used = 0
        self._notes: list[str] = []
        self._pass: tuple[int, list[int]] = (-1, [])  # its number, and its shards in order
        self._skip(position.used)

    def _skip(self, count: int) -> None:
        while count > 0:
            self._fill()
            self._used = min(count, len(self._block))
            count -= self._used

    def position(self) -> Position:
        """The position after what was drawn."""
        return self._begun._replace(used=self._used)

    def draw(self, n: int, form: Form, unreadable: int) -> Portion:
        """The next `n` records, decoded; the next readable ones stand in for those that are not.

        Raises:
            DataError: more than `unreadable` records cannot be read, or the stream is empty.
        """
        found: list[Item | None] = []
        bad: dict[str, str] = {}
        while len(found) < n:
            if self._used == len(self._block):
                self._fill()
            last = min(self._used + n - len(found), len(self._block))
            found += [self._readable(i, form, bad, unreadable) for i in range(self._used, last)]
            self._used = last
        for _ in range(BARREN):
            if any(found):
                break
            self._fill()  # nothing to stand in but what comes next, and stays to be drawn
            found[-1] = self._readable(0, form, bad, unreadable)
        good = [item for item in found if item is not None]
        if not good:
            raise too_many(list(bad.values())[-1], 0)
        stand_in = good[0]
        items: list[Item] = []
        for item in reversed(found):
            stand_in = item or stand_in
            items.append(stand_in)
        notes, self._notes = tuple(self._notes), []
        items.reverse()
        where = tuple(item.where for item in items)
        return Portion(*form.stack(items), where, self.position(), tuple(bad.items()), notes)

    def _readable(self, i: int, form: Form, bad: dict[str, str], unreadable: int) -> Item | None:
        """The record `i` of the block, or the next of the block, in a circle, that is readable."""
        for k in range(len(self._block)):
            record = self._block[(i + k) % len(self._block)]
            if record.where in bad:
                continue
            try:
                return form.item(record)
            except UnreadableError as error:
                bad[record.where] = str(error)
                if len(bad) > unreadable:
                    raise too_many(str(error), unreadable) from error
        return None

    def _fill(self) -> None:
        """Reads the next block, of this pass or of those that follow."""
        for _ in range(BARREN):
            self._begun = self._next
            records: list[Record] = []
            while len(records) < self._order.buffer and (record := self._read()) is not None:
                records.append(record)
            epoch, block = self._begun.epoch, self._begun.block
            if len(records) == self._order.buffer:
                self._next = self._here()._replace(block=block + 1)
            else:
                self._next = Position(epoch + 1)
                self.close()
            if records:
                self._block = [records[i] for i in self._order.block(epoch, block, len(records))]
                self._used = 0
                return
        why = "; ".join(self._notes) or f"is the stream shorter than {self._order.lanes} items?"
        raise DataError(f"{self._shards.name}: a reader found nothing to read ({why})")

    def _here(self) -> Position:
        return self._next._replace(at=None if self._cursor is None else self._cursor.position())

    def _read(self) -> Record | None:
        """The next record of this lane in the pass; None at its end."""
        if self._pass[0] != self._next.epoch:
            epoch = self._next.epoch
            self._pass = epoch, self._order.shards(epoch, len(self._shards))
        shards = self._pass[1]
        while self._next.place < len(shards):
            if self._cursor is None:
                self._cursor = self._open(shards[self._next.place])
            record = self._record(self._cursor)
            if record is None:
                self.close()
                self._next = self._next._replace(place=self._next.place + 1, at=None)
                continue
            seen = self._next.seen
            self._next = self._next._replace(seen=seen + 1)
            alone = self._order.by_shards(len(self._shards))
            if alone or seen % self._order.lanes == self._order.lane:
                return record
        return None

    def _open(self, shard: int) -> Cursor:
        at = self._next.at
        cursor = self._shards.open(shard, at)
        if at is None and shard == 0:
            for _ in range(self._order.held):
                self._record(cursor)
        return cursor

    def _record(self, cursor: Cursor) -> Record | None:
        try:
            return next(cursor)
        except StopIteration:
            return None
        except DamagedError as error:
            self._notes.append(str(error))
            return None

    def close(self) -> None:
        """Closes the shard."""
        if self._cursor is not None:
            self._cursor.close()
        self._cursor = None
