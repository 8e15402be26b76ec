"""Shards of a Hugging Face data set that is read over the network, or from a local folder.

Columns are taken by name: `image`, `img`, or a picture's suffix for pictures; `label`, `labels` or
`cls` for classes; `npy` and `json` as in tar shards; without any of these, every numeric column in
order is one entry of a vector.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from scoresde.data.shards import PARTS, Cursor
from scoresde.data.source import DataError
from scoresde.data.stream_items import Record
from scoresde.data.tables import _extra

COLUMNS = {
    **PARTS,
    **dict.fromkeys(("image", "img"), "picture"),
    **dict.fromkeys(("label", "labels"), "label"),
}


@dataclass(frozen=True, eq=False)
class HubShards:
    """The shards of a split of a Hugging Face data set.

    Args:
        name: "hf:owner/name", for messages.
        data: a `datasets.IterableDataset` whose pictures stay encoded.
        size: number of items, if the set says it.
        columns: what each column of use is: a part of a record, or "number".
        class_names: of the labels, if the set says them.
    """

    name: str
    data: Any
    size: int | None
    columns: Mapping[str, str]
    class_names: tuple[str, ...] | None

    def __len__(self) -> int:
        return self.data.num_shards

    def open(self, shard: int, at: Any = None) -> Cursor:
        """A shard from a state of the set's own on."""
        return _HubCursor(self, shard, at)


class _HubCursor:
    def __init__(self, shards: HubShards, shard: int, at: Any) -> None:
        self._shards, self._shard = shards, shard
        self._row: int = 0 if at is None else at["row"]
        self._state: dict[str, Any] | None = None if at is None else at["state"]
        self._rows: Iterator[dict[str, list[Any]]] | None = None

    def _open(self) -> Iterator[dict[str, list[Any]]]:
        importlib.import_module("fsspec.asyn").reset_lock()  # a fork inherits another's thread
        data = self._shards.data
        self._data = data.shard(num_shards=data.num_shards, index=self._shard)
        if self._state is not None:
            self._data.load_state_dict(self._state)
        # Its plain iterator would leave out what it takes to be other workers' part.
        return self._data.iter(batch_size=1)

    def __next__(self) -> Record:
        try:
            self._rows = self._rows or self._open()
            row = {column: cells[0] for column, cells in next(self._rows).items()}
        except StopIteration:
            raise
        except Exception as error:  # whatever the network, the file system and parsers raise
            raise DataError.caused(f"{self._shards.name}, shard {self._shard}", error) from error
        self._row += 1
        where = row.get("__key__", f"row {self._row - 1}")
        return Record(f"{self._shards.name}/shard {self._shard}/{where}", self._parts(row))

    def _parts(self, row: dict[str, Any]) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        numbers: list[Any] = []
        for column, part in self._shards.columns.items():
            cell = row.get(column)
            if part == "number":
                numbers.append(np.nan if cell is None else cell)
            elif cell is not None:
                parts[part] = _encoded(cell) if part == "picture" else cell
        if numbers:
            parts["array"] = np.asarray(numbers, np.float32)
        return parts

    def position(self) -> Any:
        if self._rows is not None:
            self._state = self._data.state_dict()
        return None if self._state is None else {"row": self._row, "state": self._state}

    def close(self) -> None:
        self._rows = None


def _encoded(cell: Any) -> bytes:
    """A cell is the encoded picture, or its bytes and the path it came from."""
    if not isinstance(cell, Mapping):
        return cell
    if cell.get("bytes") is not None:
        return cell["bytes"]
    opened = importlib.import_module("fsspec").open(cell.get("path") or "", "rb")
    with opened as file:
        return file.read()


def open_hub_stream(name: str) -> dict[str, HubShards]:
    """The splits of a Hugging Face data set, `owner/name` or a local folder, as streams.

    Raises:
        DataError: `datasets` is not installed or too old, or does not find or accept the set.
    """
    hub = _extra("datasets", "a hub data set", "datasets", "hub")
    try:
        names = hub.get_dataset_split_names(name)
        return {split: _shards(hub, name, split) for split in names}
    except DataError:
        raise
    except Exception as error:  # network, file system and parsers
        raise DataError.caused(f"hf:{name}", error) from error


def _shards(hub: Any, name: str, split: str) -> HubShards:
    data = hub.load_dataset(name, split=split, streaming=True)
    if not hasattr(data, "shard") or not hasattr(data, "state_dict"):
        raise DataError(f"hf:{name}: to stream needs datasets 3.2 or newer, not {hub.__version__}")
    features = data.features or data.resolve_features().features or {}
    for column, feature in features.items():
        if isinstance(feature, hub.Image):  # decoding is ours, for one result
            data = data.cast_column(column, hub.Image(decode=False))
    columns = {c: COLUMNS[c] for c in features if c in COLUMNS}
    if not set(columns.values()) & {"picture", "array"}:
        number = {c: "number" for c, feature in features.items() if _is_number(feature)}
        if not number:
            raise DataError(
                f"hf:{name}: has columns {', '.join(features)}; there must be one called image, "
                "or numeric ones"
            )
        columns = number
    label = next((c for c, part in columns.items() if part == "label"), None)
    names = getattr(features.get(label), "names", None)
    known = (data.info.splits or {}).get(split)
    size = getattr(known, "num_examples", None) or None
    return HubShards(f"hf:{name}", data, size, columns, tuple(names) if names else None)


def _is_number(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint", "float"))
