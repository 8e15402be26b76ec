"""What a series is, and the table that it becomes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 16
FORMAT = 1
_KINDS = {"float": "<f8", "int": "<i8", "bool": "|b1"}
TENSOR = {"float": torch.float64, "int": torch.int64, "bool": torch.bool}
ANEW = "Name another file, or begin anew with fresh=True (--overwrite)"


class SeriesError(ValueError):
    """A series that cannot begin, go on or be read, said in one line."""


@dataclass(frozen=True, eq=False)
class Table:
    """One value an item in each column, and how they were obtained.

    Attributes:
        items: indices of the items, int64, ``(N,)``.
        columns: name to values, float64, int64 or bool, ``(N,)``.
        fingerprint: what the values depend on, as it was given.
        seconds: of evaluation, summed over batches, processes and interruptions.
        evaluated: items that this call evaluated; the others were on the disk.
    """

    items: Tensor
    columns: dict[str, Tensor]
    fingerprint: dict[str, Any]
    seconds: float
    evaluated: int = 0

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class Plan:
    """What a series is: two runs of one plan give the same file."""

    count: int
    columns: dict[str, str]
    fingerprint: dict[str, Any]
    block: int = BLOCK
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        i, n = self.part
        if self.count < 1 or self.block < 1 or not 0 <= i < n:
            raise SeriesError(
                "a series needs count >= 1, block >= 1 and a part (i, n) with 0 <= i < n, "
                f"got count={self.count}, block={self.block}, part={self.part}"
            )
        kinds = set(self.columns.values())
        if not kinds or "item" in self.columns or not kinds <= set(_KINDS):
            raise SeriesError(
                f"columns are names, other than 'item', with {', '.join(_KINDS)}; "
                f"got {self.columns}"
            )
        try:
            plain = json.loads(json.dumps(self.fingerprint))
        except (TypeError, ValueError) as error:
            raise SeriesError(f"the fingerprint must be plain values: {error}") from error
        object.__setattr__(self, "fingerprint", plain)

    @property
    def blocks(self) -> range:
        """The blocks of the part."""
        total, (i, n) = -(-self.count // self.block), self.part
        return range(i * total // n, (i + 1) * total // n)

    @property
    def first(self) -> int:
        """The first item; :attr:`stop` is the one after the last."""
        return min(self.blocks.start * self.block, self.count)

    @property
    def stop(self) -> int:
        """The item after the last."""
        return min(self.blocks.stop * self.block, self.count)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of a row."""
        return np.dtype([(name, _KINDS[kind]) for name, kind in self.columns.items()])

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that must agree for two runs to be of one series."""
        return {
            "format": FORMAT, "fingerprint": self.fingerprint, "items": self.count,
            "block": self.block, "part": list(self.part),
            "columns": [list(pair) for pair in self.columns.items()],
        }  # fmt: skip

    def agree(self, other: Mapping[str, Any], where: str) -> None:
        """Refuses the identity of another series, naming what differs."""
        ours, theirs = (_flat("", dict(v)) for v in (self.identity, other))
        told = [
            f"{key.removeprefix('fingerprint.')} is {theirs.get(key, 'not given')} there "
            f"and {ours.get(key, 'not given')} here"
            for key in {**theirs, **ours}
            if theirs.get(key) != ours.get(key)
        ]
        if told:
            raise SeriesError(f"{where} is of another series: {'; '.join(told)}. {ANEW}")

    def tensors(self, rows: np.ndarray) -> dict[str, Tensor]:
        """The columns of rows."""
        return {
            name: torch.as_tensor(rows[name].copy(), dtype=TENSOR[kind])
            for name, kind in self.columns.items()
        }

    def table(self, rows: np.ndarray, seconds: float, evaluated: int = 0) -> Table:
        """The rows of the part as a table."""
        items = torch.arange(self.first, self.stop)
        return Table(items, self.tensors(rows), self.fingerprint, seconds, evaluated)


def _flat(key: str, value: Any) -> dict[str, str]:
    """Nested mappings as ``{"a.b": text}``."""
    if isinstance(value, Mapping):
        return {
            k: text
            for name, each in value.items()
            for k, text in _flat(f"{key}.{name}" if key else str(name), each).items()
        }
    return {key: json.dumps(value)}
