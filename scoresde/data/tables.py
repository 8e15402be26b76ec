"""Read tables: parquet files, and Hugging Face data sets through `datasets`.

A column `image` (or `img`) of encoded pictures, with `label` (or `labels`) if there is one; or,
without it, every numeric column in order as one entry of a vector. A column `vector` (or
`condition`) of lists of numbers, all of one length, are vectors that condition the items. In a
folder the files `<split>-00000-of-00002.parquet` are the shards of a split.

Parquet cannot be read at random. Where the pictures would not fit the memory granted, its rows are
unpacked once into an Arrow file, which is mapped, as `datasets` does with its own.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.data.arrays import check_labels
from scoresde.data.dataset import SPLITS, DataError, spread
from scoresde.data.items import Items, Reader, Terms, names_of_classes, unpacked
from scoresde.data.pictures import SURVEYED, Frame, Picture
from scoresde.data.rows import Columns, HeldRows, HubRows, MappedRows, Rows, write_rows

SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-(?P<of>\d{5})(-\w+)?\.parquet")


def open_tables(root: Path, files: list[Path]) -> dict[str, Reader]:
    """The splits of the parquet files in the folder `root`, and what reads each.

    Raises:
        DataError: a split without all of its shards.
    """
    shards: dict[str, list[Path]] = {}
    for file in files:
        match = SHARD.fullmatch(file.name)
        split = match["split"] if match else file.stem if file.stem in SPLITS else "train"
        shards.setdefault(split, []).append(file)
    for split, members in shards.items():
        match = SHARD.fullmatch(members[0].name)
        if match and len(members) != int(match["of"]):
            raise DataError(
                f"{root.name}: split {split!r} has {len(members)} of its "
                f"{int(match['of'])} parquet files"
            )
    return {split: partial(read_tables, root.name, members) for split, members in shards.items()}


def open_hub(name: str) -> dict[str, Reader]:
    """The splits of a Hugging Face data set, `owner/name` or a local folder, and their readers.

    Raises:
        DataError: `datasets` is not installed, or it does not find or accept the set.
    """
    hub = _extra("datasets", "a hub data set", "datasets", "hub")
    try:
        splits = hub.get_dataset_split_names(name)
    except (OSError, ValueError) as error:
        raise DataError.caused(f"hf:{name}", error) from error
    return {split: partial(_read_hub, name, split) for split in splits}


def read_tables(name: str, files: list[Path], terms: Terms) -> Items:
    """The rows of parquet `files`, in order, at most `terms.limit`, as items of a set `name`.

    Raises:
        DataError: `pyarrow` is not installed, or a damaged file, picture or label.
    """
    parquet = _extra("pyarrow.parquet", "parquet", "pyarrow", "parquet")

    def batches(columns: list[str], limit: int | None) -> Iterator[Any]:
        left = limit
        for file in files:
            try:
                with parquet.ParquetFile(file) as table:
                    for batch in table.iter_batches(256, columns=columns):
                        if left == 0:
                            return
                        yield batch if left is None else batch.slice(0, left)
                        left = None if left is None else max(left - batch.num_rows, 0)
            except (OSError, ValueError) as error:
                raise DataError.caused(file.name, error) from error

    try:
        schema = parquet.read_schema(files[0])
        count = sum(parquet.read_metadata(file).num_rows for file in files)
    except (OSError, ValueError) as error:
        raise DataError.caused(files[0].name, error) from error
    columns = Columns.of(schema, name)
    if not count:
        raise DataError(f"{name}: has no rows")
    count = min(count, count if terms.limit is None else terms.limit)
    few = HeldRows(batches(columns.all, SURVEYED))
    items = _items(name, few, columns, schema, terms.size)
    if items.nbytes // len(items) * count <= (terms.memory or 0) or terms.memory is None:
        rows: Rows = HeldRows(batches(columns.all, terms.limit))
    else:
        kept = few.batches[0].schema

        def write(to: Path) -> None:
            write_rows(to, batches(columns.all, None), kept)

        rows = MappedRows(unpacked(files, " ".join(columns.all), write), count)
    values = None
    if columns.label is not None:
        parts = batches([columns.label], terms.limit)
        values = np.concatenate([part.column(0).to_numpy(False) for part in parts])
    return _items(name, rows, columns, schema, terms.size, values)


def _read_hub(name: str, split: str, terms: Terms) -> Items:
    hub = _extra("datasets", "a hub data set", "datasets", "hub")
    try:
        data = hub.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise DataError.caused(f"hf:{name}", error) from error
    for column, feature in data.features.items():
        if isinstance(feature, hub.Image):  # decoding is ours, for one result
            data = data.cast_column(column, hub.Image(decode=False))
    if terms.limit is not None and terms.limit < len(data):
        data = data.select(range(terms.limit))
    schema = data.features.arrow_schema
    columns = Columns.of(schema, name)
    if not len(data):
        raise DataError(f"{name}: has no rows")
    data = data.select_columns(columns.all).with_format("arrow")
    values = None if columns.label is None else data[:][columns.label].to_numpy()
    return _items(name, HubRows(data), columns, schema, terms.size, values)


def _extra(module: str, what: str, package: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"reading {what} needs {package}: pip install 'scoresde[{extra}]'"
        ) from error


@dataclass(frozen=True, eq=False)
class TableItems(Items):
    """Rows of a table: pictures, or vectors of numbers."""

    name: str
    rows: Rows
    columns: Columns
    frame: Frame | None
    shape: tuple[int, ...]
    class_names: tuple[str, ...] | None = None
    vectors: int | None = None

    @property
    def levels(self) -> int | None:  # type: ignore[override]
        """256 for pictures."""
        return None if self.frame is None else 256

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, i: int) -> str:
        """The number of a row."""
        return f"{self.name}, row {i}"

    def read(self, index: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Pictures `(b, C, H, W)`, uint8, or vectors, float32, and their classes or vectors."""
        table = self.rows.take(index)
        if self.frame is not None:
            cells = table.column(self.columns.image).to_pylist()
            x = self.frame.stack(
                [_picture(c, self.where(i)) for c, i in zip(cells, index, strict=True)]
            )
        else:
            columns = [table.column(c).to_numpy() for c in self.columns.numbers]
            x = torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))
        if self.vectors is not None:
            return x, self._vectors(table, index)
        if self.class_names is None:
            return x, None
        y = table.column(self.columns.label).to_numpy().astype(np.int64)
        return x, torch.from_numpy(y)

    def _vectors(self, table: Any, index: Sequence[int]) -> Tensor:
        found = table.column(self.columns.vector).to_pylist()
        for i, vector in zip(index, found, strict=True):
            if vector is None or len(vector) != self.vectors:
                raise DataError(
                    f"{self.where(i)}: its {self.columns.vector} has "
                    f"{0 if vector is None else len(vector)} numbers, the first row's "
                    f"{self.vectors}"
                )
        return torch.tensor(found, dtype=torch.float32)

    def in_colour(self) -> TableItems:
        """The same pictures with three channels."""
        if self.frame is None:
            return self
        frame = replace(self.frame, shape=(3, *self.shape[1:]))
        return replace(self, frame=frame, shape=frame.shape)


def _items(
    name: str,
    rows: Rows,
    columns: Columns,
    schema: Any,
    size: int | None,
    values: np.ndarray | None = None,
) -> TableItems:
    """Items of a table, after a look at some of its rows and at the `values` of its labels."""
    if columns.image is None:
        items = TableItems(name, rows, columns, None, (len(columns.numbers),))
    else:
        index = spread(len(rows), SURVEYED).tolist()
        cells = rows.take(index).column(columns.image).to_pylist()
        pictures = [_picture(c, f"{name}, row {i}") for c, i in zip(cells, index, strict=True)]
        frame = Frame.of(pictures, size)
        items = TableItems(name, rows, columns, frame, frame.shape)
    if columns.vector is not None:
        first = rows.take([0]).column(columns.vector).to_pylist()[0]
        return replace(items, vectors=len(first or ()))
    if values is None:
        return items
    check_labels(values.dtype, name)
    classes = names_of_classes(int(values.min()), int(values.max()), name)
    names = classes and (_class_names(schema, columns.label) or classes)
    if names and len(names) <= values.max():
        raise DataError(
            f"{name}: labels run from {values.min()} to {values.max()}; "
            f"they must lie in 0..{len(names) - 1}"
        )
    return replace(items, class_names=names)


def _picture(cell: Any, where: str) -> Picture:
    """A cell is the encoded picture, or a struct of it and the path it came from."""
    encoded = cell.get("bytes") if isinstance(cell, dict) else cell
    path = cell.get("path") if isinstance(cell, dict) else None
    name = f"{where} ({path})" if path else where

    def read() -> bytes:
        if isinstance(encoded, bytes):
            return encoded
        if path is None:
            raise ValueError("the row has none")
        return Path(path).read_bytes()

    return name, read


def _class_names(schema: Any, label: str | None) -> tuple[str, ...] | None:
    """The class names that the Hugging Face metadata of a schema gives the label column."""
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get(label) or {}
    names = feature.get("names")
    return tuple(names) if names else None
