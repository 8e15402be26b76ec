"""Read tables: parquet files, and Hugging Face data sets through `datasets`.

A column `image` (or `img`) of encoded pictures, with `label` (or `labels`) if there is one; or,
without it, every numeric column in order as one entry of a vector. In a folder the files
`<split>-00000-of-00002.parquet` are the shards of a split.
"""

from __future__ import annotations

import importlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scoresde.data.arrays import labels
from scoresde.data.dataset import SPLITS, DataError, Dataset, Reader
from scoresde.data.pictures import Picture, decode_all

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


def read_tables(name: str, files: list[Path], size: int | None, limit: int | None) -> Dataset:
    """The rows of parquet `files`, in order, at most `limit`, as a data set called `name`.

    Raises:
        DataError: `pyarrow` is not installed, or a damaged file, picture or label.
    """
    parquet = _extra("pyarrow.parquet", "parquet", "pyarrow", "parquet")

    def batches() -> Iterator[Any]:
        for file in files:
            try:
                with parquet.ParquetFile(file) as table:
                    yield from table.iter_batches(batch_size=1024)
            except (OSError, ValueError) as error:
                raise DataError.caused(file.name, error) from error

    return _from_batches(batches(), name, size, limit)


def _read_hub(name: str, split: str, size: int | None, limit: int | None) -> Dataset:
    hub = _extra("datasets", "a hub data set", "datasets", "hub")
    try:
        data = hub.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise DataError.caused(f"hf:{name}", error) from error
    for column, feature in data.features.items():
        if isinstance(feature, hub.Image):  # decoding is ours, for one result
            data = data.cast_column(column, hub.Image(decode=False))
    tables = data.with_format("arrow").iter(batch_size=1024)
    batches = (batch for table in tables for batch in table.to_batches())
    return _from_batches(batches, name, size, limit)


def _extra(module: str, what: str, package: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"reading {what} needs {package}: pip install 'scoresde[{extra}]'"
        ) from error


def _from_batches(
    batches: Iterable[Any], name: str, size: int | None, limit: int | None
) -> Dataset:
    """Arrow record batches as pictures, with or without labels, or as vectors of numbers."""
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise DataError(f"{name}: has no rows")
    columns = first.schema.names
    image = next((c for c in ("image", "img") if c in columns), None)
    label = next((c for c in ("label", "labels") if c in columns), None)
    kept: list[Any] = []
    rows = 0
    for batch in itertools.chain([first], stream):
        kept.append(batch if limit is None else batch.slice(0, limit - rows))
        rows += len(kept[-1])
        if rows == limit:
            break
    if image is None:
        return Dataset(torch.from_numpy(_numbers(kept, name)), name=name)
    cells = itertools.chain.from_iterable(batch.column(image).to_pylist() for batch in kept)
    pictures = [_picture(cell, f"{name}, row {i}") for i, cell in enumerate(cells)]
    y = None
    if label is not None:
        y = labels(np.concatenate([batch.column(label).to_numpy(False) for batch in kept]), name)
    names = _class_names(first.schema, label) if y is not None else None
    return Dataset(decode_all(pictures, size), y, 256, name, names)


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


def _numbers(batches: list[Any], name: str) -> np.ndarray:
    """The numeric columns as `(N, D)`, float32; a missing value is NaN."""
    types = importlib.import_module("pyarrow").types
    numeric = [
        field.name
        for field in batches[0].schema
        if types.is_integer(field.type) or types.is_floating(field.type)
    ]
    if not numeric:
        raise DataError(
            f"{name}: has columns {', '.join(batches[0].schema.names)}; there must be "
            "one called image, or numeric ones"
        )
    columns = [
        np.concatenate([batch.column(c).to_numpy(False) for batch in batches]) for c in numeric
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def _class_names(schema: Any, label: str | None) -> tuple[str, ...] | None:
    """The class names that the Hugging Face metadata of a schema gives the label column."""
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get(label) or {}
    names = feature.get("names")
    return tuple(names) if names else None
