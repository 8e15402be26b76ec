"""What training needs of data: a `Source` says what its items are, its `Loader` hands them out.

Every step has a global batch of `Share.batch` items; a process of rank `r` in a world of `w`
gets the items `[r b/w, (r+1) b/w)` of it. What a batch holds depends on the seed and the step (or,
of a stream, on its state), never on how many processes read it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class DataError(ValueError):
    """What was wrong with the data, and what is accepted, in one line."""

    @classmethod
    def caused(cls, name: str, error: Exception) -> DataError:
        """The first line of another library's error, after the name of what it was about."""
        return cls(f"{name}: {(str(error) or type(error).__name__).splitlines()[0]}")


class UnreadableError(DataError):
    """One item that cannot be read (a damaged or truncated file); another may stand in for it."""


class Batch(NamedTuple):
    """One process's items of a step, on the CPU.

    Args:
        x: raw items, `(b, *shape)`: whole levels (uint8, int64) or float32.
        y: classes, `(b,)`, int64; or vectors, `(b, d)`, float32; None without either.
        where: one name an item, for messages ("item 17", "cat/3.png").
        notes: messages to be said once (an unreadable item that was replaced).
    """

    x: Tensor
    y: Tensor | None
    where: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Share:
    """Which part of every global batch is this process's, and how it is read.

    Args:
        batch: items of a global batch.
        seed: of the order of the items.
        rank: of this process, `0..world-1`.
        world: number of processes that share a batch.
        workers: processes that read for this one, where the data are not in memory.

    Raises:
        DataError: a batch that cannot be shared equally, or a number outside its range.
    """

    batch: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    workers: int = 0

    def __post_init__(self) -> None:
        if self.world < 1 or not 0 <= self.rank < self.world:
            raise DataError(f"rank {self.rank} is not one of a world of {self.world}")
        if self.batch < 1 or self.batch % self.world:
            raise DataError(
                f"a batch of {self.batch} items cannot be shared by {self.world} processes; "
                "its size must be a multiple of their number"
            )
        if self.workers < 0:
            raise DataError(f"workers is {self.workers}; it must be at least 0")

    @property
    def local(self) -> int:
        """Items of a batch that are this process's."""
        return self.batch // self.world

    @property
    def start(self) -> int:
        """Where they begin in the global batch."""
        return self.rank * self.local


class Loader(ABC, Iterator[Batch]):
    """Batches without end: the one of the step asked for, then those of the steps after it."""

    @abstractmethod
    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            DataError: too many unreadable items, items that do not fit, or workers that die.
        """

    def state(self) -> dict[str, Any]:
        """The position after what has been handed out, as JSON; {} where the step decides."""
        return {}

    def close(self) -> None:
        """Ends the workers and closes the files; a closed loader is not used again."""

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@runtime_checkable
class Source(Protocol):
    """Items to train on, in memory or read when they are needed."""

    @property
    def name(self) -> str:
        """What the data is called in reports."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one item."""

    @property
    def levels(self) -> int | None:
        """Number of discrete levels; None for continuous data."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None without labels."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """One name a class; None without labels."""

    @property
    def vectors(self) -> int | None:
        """Dimension d of the vectors that condition the items; None without any."""

    @property
    def size(self) -> int | None:
        """Number of items; None for a stream that does not know it."""

    def probe(self, n: int) -> Tensor:
        """At most `n` raw items, `(m, *shape)`, spread over the data, for its moments."""

    def loader(
        self, share: Share, step: int = 0, state: Mapping[str, Any] | None = None
    ) -> Loader:
        """Batches from that of `step` on; a stream continues from the `state` of a loader."""
