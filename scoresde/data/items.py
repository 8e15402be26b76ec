"""The items of a split on disk: described in one process, read when asked for in any.

`Items` are small and can be pickled: paths and shapes, never open files. What cannot be read at
random (packed arrays, parquet) is unpacked once into a folder of its own.
"""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from scoresde.data.dataset import MAX_CLASSES, DataError, Dataset

MIB = 2**20


@dataclass(frozen=True)
class Terms:
    """How a split is to be read.

    Args:
        size: pictures are centre-cropped and resized to `size x size`.
        limit: at most so many items.
        memory: bytes that the decoded items may take; None: as many as there are.
    """

    size: int | None = None
    limit: int | None = None
    memory: int | None = None

    def fits(self, count: int) -> bool:
        """Whether so many bytes may be held."""
        return self.memory is None or count <= self.memory


class Items(ABC):
    """Items of one shape, each read when it is asked for.

    Args:
        name: what the data is called in reports.
        shape: of one item.
        levels: number of discrete levels; None for continuous data.
        class_names: one name a class; None without labels.
        vectors: dimension of the vectors that condition the items; None without any.
    """

    name: str
    shape: tuple[int, ...]
    levels: int | None
    class_names: tuple[str, ...] | None
    vectors: int | None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, i: int) -> str:
        """The name of an item, for messages."""

    @abstractmethod
    def read(self, index: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The items `(b, *shape)` at `index`, and their classes or vectors.

        Raises:
            UnreadableError: an item is damaged.
            DataError: an item does not fit the others.
        """

    @property
    def nbytes(self) -> int:
        """The size of all items when they are decoded."""
        small = self.levels is not None and self.levels <= 256
        return len(self) * math.prod(self.shape) * (1 if small else 4)

    def in_colour(self) -> Items:
        """The same items with three channels, where grey was only a guess."""
        return self


class ColourError(DataError):
    """A picture with colours in a set that was taken to be grey."""


Reader = Callable[[Terms], "Dataset | Items"]  # what reads one split


def names_of_classes(low: int, high: int, name: str) -> tuple[str, ...] | None:
    """Names "0", "1", ... for labels that run from `low` to `high`; None if all are negative.

    Raises:
        DataError: some are negative, or there are too many.
    """
    if high < 0:  # the custom for a test set without any
        return None
    if low < 0 or high >= MAX_CLASSES:
        raise DataError(
            f"{name}: labels run from {low} to {high}; they must lie in 0..{MAX_CLASSES - 1}"
        )
    return tuple(str(k) for k in range(high + 1))


def unpacked(files: Sequence[Path], part: str, write: Callable[[Path], None]) -> Path:
    """A file that `write` makes of `part` of `files`, kept until one of them changes.

    It lies in the folder `SCORESDE_CACHE`, or `~/.cache/scoresde`.

    Raises:
        DataError: it cannot be written there.
    """
    asked = os.environ.get("SCORESDE_CACHE")
    folder = Path(asked) if asked else Path.home() / ".cache" / "scoresde"
    key = hashlib.sha256(part.encode())
    for file in files:
        status = file.stat()
        key.update(f"{file.resolve()}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    path = folder / key.hexdigest()[:32]
    if path.exists():
        return path
    partial = folder / f"{path.name}.{os.getpid()}"  # other processes may be at it too
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{files[0].name}: it must be unpacked to be read at random, and {folder} does not "
            f"take it: {error.strerror or error}; name another folder in SCORESDE_CACHE"
        ) from error
    return path
