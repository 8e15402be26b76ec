"""Rows of tables in Arrow's form: held, mapped from a file, or of a Hugging Face data set."""

from __future__ import annotations

import importlib
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol


class Rows(Protocol):
    """Rows that are read by their numbers; it can be pickled."""

    def __len__(self) -> int: ...

    def take(self, index: Sequence[int]) -> Any:
        """The rows at `index`, a pyarrow table."""


class HeldRows:
    """Record batches in memory, or mapped into it."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = [batch for batch in batches if batch.num_rows]
        self.starts = [0, *accumulate(batch.num_rows for batch in self.batches)]

    def __len__(self) -> int:
        return self.starts[-1]

    def take(self, index: Sequence[int]) -> Any:
        """The rows at `index`, a pyarrow table; nothing else is copied."""
        arrow = importlib.import_module("pyarrow")
        parts = []
        for i in index:
            which = bisect_right(self.starts, i) - 1
            parts.append(self.batches[which].slice(i - self.starts[which], 1))
        return arrow.Table.from_batches(parts)


@dataclass(frozen=True)
class MappedRows:
    """Rows of an Arrow file, mapped into the memory of each process that reads them."""

    path: Path
    count: int

    def __len__(self) -> int:
        return self.count

    def take(self, index: Sequence[int]) -> Any:
        """The rows at `index`, a pyarrow table."""
        return _mapped(self.path, os.getpid()).take(index)


@lru_cache(maxsize=8)
def _mapped(path: Path, process: int) -> HeldRows:
    arrow = importlib.import_module("pyarrow")
    file = arrow.ipc.open_file(arrow.memory_map(str(path)))
    return HeldRows(file.get_batch(k) for k in range(file.num_record_batches))


@dataclass(frozen=True, eq=False)
class HubRows:
    """Rows of a `datasets.Dataset` that gives Arrow tables, which maps its files itself."""

    data: Any

    def __len__(self) -> int:
        return len(self.data)

    def take(self, index: Sequence[int]) -> Any:
        """The rows at `index`, a pyarrow table."""
        return self.data[list(index)]


def write_rows(path: Path, batches: Iterable[Any], schema: Any) -> None:
    """Writes record batches to an Arrow file, batch by batch."""
    arrow = importlib.import_module("pyarrow")
    with arrow.OSFile(str(path), "wb") as sink, arrow.ipc.new_file(sink, schema) as file:
        for batch in batches:
            file.write_batch(batch)
