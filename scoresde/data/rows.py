"""Tables in Arrow's form: which columns hold what; rows that are held, mapped or of the hub."""

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

from scoresde.data.dataset import DataError


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what.

    Args:
        image: encoded pictures; None where the items are vectors of numbers.
        numbers: one an entry of such a vector.
        label: classes.
        vector: vectors that condition the items.
    """

    image: str | None
    numbers: tuple[str, ...]
    label: str | None
    vector: str | None

    @classmethod
    def of(cls, schema: Any, name: str) -> Columns:
        """The columns that a schema names.

        Raises:
            DataError: neither pictures nor numbers.
        """
        types = importlib.import_module("pyarrow").types
        image = next((c for c in ("image", "img") if c in schema.names), None)
        label = next((c for c in ("label", "labels") if c in schema.names and image), None)

        def number(kind: Any) -> bool:
            return bool(types.is_integer(kind) or types.is_floating(kind))

        def listed(kind: Any) -> bool:
            kinds = (types.is_list, types.is_large_list, types.is_fixed_size_list)
            return any(is_kind(kind) for is_kind in kinds) and number(kind.value_type)

        lists = {f.name for f in schema if listed(f.type)}
        vector = next((c for c in ("vector", "condition") if c in lists), None)
        numeric = tuple(f.name for f in schema if number(f.type))
        if image is None and not numeric:
            raise DataError(
                f"{name}: has columns {', '.join(schema.names)}; there must be "
                "one called image, or numeric ones"
            )
        return cls(image, () if image else numeric, None if vector else label, vector)

    @property
    def all(self) -> list[str]:
        """The columns that are read."""
        return [c for c in (self.image, *self.numbers, self.label, self.vector) if c is not None]


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
