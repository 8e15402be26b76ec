"""A stream as a `Source`: its loader goes on, bit for bit, from the state of another.

With `workers` readers (0 counts as 1), the batch of step n comes from reader `n mod workers` of
the process, so that it is a function of the seed, the step, the rank and of the numbers of
processes, readers and records a block; never of how fast anything was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from scoresde.data.items import MIB
from scoresde.data.lazy import AT_LEAST, too_many
from scoresde.data.shards import Cursor, DamagedError, Shards
from scoresde.data.source import Batch, DataError, Loader, Share, UnreadableError
from scoresde.data.stream import Lane, Order, Portion, Position
from scoresde.data.stream_items import Form, Item
from scoresde.data.workers import Failed, Workers

PROBED = 8  # shards, spread over the stream, whose heads a probe reads


@dataclass(frozen=True, eq=False)
class StreamSource:
    """The training part of a stream.

    Args:
        shards: what it is read from.
        form: of its items.
        class_names: one name a class; None without labels.
        held: records at the head of the first shard that are held out.
        buffer: records that each reader holds and permutes at a time.
        unreadable: how many different items may be replaced; 0 for none.
        memory: bytes that a probe may take as float64.
        notes: what to say once of the stream.
    """

    shards: Shards
    form: Form
    class_names: tuple[str, ...] | None = None
    held: int = 0
    buffer: int = 1024
    unreadable: int = 10
    memory: int = 512 * MIB
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the data is called in reports."""
        return self.shards.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one item."""
        return self.form.shape

    @property
    def levels(self) -> int | None:
        """Number of discrete levels; None for continuous data."""
        return self.form.levels

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None without labels, and where it is not known."""
        return self.form.classes

    @property
    def vectors(self) -> int | None:
        """Dimension d of the vectors that condition the items; None without any."""
        return self.form.vectors

    @property
    def size(self) -> int | None:
        """Number of items, if the stream knows it."""
        return None if self.shards.size is None else self.shards.size - self.held

    def probe(self, n: int) -> Tensor:
        """At most `n` raw items, `(m, *shape)`, of the heads of some shards, for its moments.

        Fewer of large items: in float64 they fit the memory that was granted.
        """
        room = max(AT_LEAST, self.memory // (8 * math.prod(self.shape)))
        count, items = min(PROBED, len(self.shards)), list[Item]()
        for k in range(count):
            shard = k * len(self.shards) // count
            # What the shards before lack of their share is made up for.
            share = -(-(min(n, room) - len(items)) // (count - k))
            items += readable(self.shards, shard, self.form, share, self.held * (shard == 0))
        if not items:
            raise DataError(f"{self.name}: no item can be read")
        return self.form.stack(items)[0]

    def loader(
        self, share: Share, step: int = 0, state: Mapping[str, Any] | None = None
    ) -> Loader:
        """Batches from that of `step` on, from a loader's `state`, else from the beginning."""
        return StreamLoader(self, share, step, state)


def readable(shards: Shards, shard: int, form: Form, n: int, skipped: int = 0) -> list[Item]:
    """At most `n` readable items of a shard, after those that are `skipped`."""
    items: list[Item] = []
    cursor: Cursor = shards.open(shard)
    try:
        while len(items) < n:
            record = next(cursor)
            skipped -= 1
            if skipped < 0:
                try:
                    items.append(form.item(record))
                except UnreadableError:
                    continue
    except (StopIteration, DamagedError):
        pass
    finally:
        cursor.close()
    return items


class StreamLoader(Loader):
    """Batches of a `StreamSource`.

    Args:
        source: the stream.
        share: of this process.
        step: of the first batch.
        state: of a loader that has handed out the batches before; without one they are read again.
        context: how workers are started ("fork", "spawn", "forkserver"); None for the default.
    """

    def __init__(
        self,
        source: StreamSource,
        share: Share,
        step: int = 0,
        state: Mapping[str, Any] | None = None,
        context: str | None = None,
    ) -> None:
        self._source, self._share, self._step = source, share, step
        self._readers = max(share.workers, 1)
        self._notes, self._said = list(source.notes), set[str]()
        self._named: set[str] = set()
        self._positions = self._beginnings(state)
        self._lane: Lane | None = None
        self._workers: Workers[Portion] = Workers(
            source.name, self._reading, share.workers, context
        )
        lanes, shards = share.world * self._readers, len(source.shards)
        if lanes > shards:
            self._notes.append(
                f"{source.name}: fewer shards ({shards}) than readers ({lanes}); each reads all "
                f"and keeps one item in {lanes}; more shards or fewer training.workers are faster"
            )

    @property
    def _terms(self) -> dict[str, int]:
        """What must be the same for a state to be of use."""
        share, source = self._share, self._source
        return {
            "seed": share.seed,
            "rank": share.rank,
            "world": share.world,
            "workers": self._readers,
            "buffer": source.buffer,
            "shards": len(source.shards),
            "held": source.held,
        }

    def _beginnings(self, state: Mapping[str, Any] | None) -> list[Position]:
        """Where each reader of this process goes on."""
        readers = range(self._readers)
        if not state:  # reader k has had the batches k, k + readers, ... below the step
            before = [len(range(k, self._step, self._readers)) for k in readers]
            return [Position(used=count * self._share.local) for count in before]
        try:
            theirs, lanes = dict(state["terms"]), [Position(**lane) for lane in state["lanes"]]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self._source.name}: this is no state of a stream") from error
        ours = self._terms
        if theirs == ours and len(lanes) == len(readers):
            return lanes
        others = [
            f"{k} was {theirs.get(k)} and is {ours[k]}" for k in ours if theirs.get(k) != ours[k]
        ]
        epoch = 1 + max((lane.epoch for lane in lanes), default=0)
        self._notes.append(
            f"{self._source.name}: the stream cannot go on where it was ({', '.join(others)}); "
            f"pass {epoch + 1} begins instead, so that some items come again early"
        )
        return [Position(epoch) for _ in readers]

    def __next__(self) -> Batch:
        source, notes = self._source, self._notes
        reader = self._step % self._readers
        portion = self._read(notes)
        for where, message in portion.bad:
            if where not in self._named:
                self._named.add(where)
                notes.append(f"{message}; the next one stands in for it")
                if len(self._named) > source.unreadable:
                    raise too_many(message, source.unreadable)
        notes += portion.notes
        self._notes = []
        new = tuple(note for note in dict.fromkeys(notes) if note not in self._said)
        self._said |= set(new)
        self._positions[reader] = portion.position  # what an error keeps back is not passed over
        self._step += 1
        return Batch(portion.x, portion.y, portion.where, new)

    def _reading(self) -> tuple[Any, Any]:
        return _Reading(self._source, self._share, self._step, list(self._positions)), None

    def _read(self, notes: list[str]) -> Portion:
        if self._share.workers:
            return self._workers.next(f"the batch of step {self._step}", notes)
        if self._lane is None:
            self._lane = _lane(self._source, self._share, 0, self._positions[0])
        return self._lane.draw(self._share.local, self._source.form, self._source.unreadable)

    def state(self) -> dict[str, Any]:
        """The position after what has been handed out, of each reader of this process, as JSON."""
        lanes = [position._asdict() for position in self._positions]
        return json.loads(json.dumps({"terms": self._terms, "lanes": lanes}))

    def close(self) -> None:
        """Ends the workers and closes the files; a next batch would start them again."""
        self._workers.close()
        if self._lane is not None:
            self._lane.close()
        self._lane = None


def _lane(source: StreamSource, share: Share, reader: int, position: Position) -> Lane:
    """The lane of a reader of a process, from a position on."""
    readers = max(share.workers, 1)
    lane, lanes = share.rank * readers + reader, share.world * readers
    order = Order(lane, lanes, source.buffer, share.seed, source.held)
    return Lane(source.shards, order, position)


class _Reading(IterableDataset):  # type: ignore[type-arg]
    """What a worker does; a DataError comes back as its line, not as a traceback."""

    def __init__(
        self, source: StreamSource, share: Share, step: int, positions: list[Position]
    ) -> None:
        self._source, self._share, self._step, self._positions = source, share, step, positions

    def __iter__(self) -> Iterator[Portion | Failed]:
        worker = get_worker_info()
        # The first of the workers is asked first, whichever reader's turn it is.
        reader = (self._step + (worker.id if worker else 0)) % len(self._positions)
        source = self._source
        try:
            lane = _lane(source, self._share, reader, self._positions[reader])
            while True:
                yield lane.draw(self._share.local, source.form, source.unreadable)
        except DataError as error:
            yield Failed(str(error))
