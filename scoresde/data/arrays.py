"""Read arrays: `.npy`, and `.npz` with keys `x` and `y`, or `x_train`, `y_train`, `x_test`, ...

uint8 is 256 levels, and pictures `(N, H, W)` or `(N, H, W, C)` become `(N, C, H, W)`. Any other
type becomes float32 and keeps its shape: `(N, D)`, `(N, C, L)`, `(N, C, H, W)`, `(N, C, D, H, W)`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.data.dataset import SPLITS, DataError, Dataset, Reader


def open_arrays(path: Path) -> dict[str, Reader]:
    """The splits of a .npy or .npz file and what reads each.

    Raises:
        DataError: a damaged file, pickled objects, or no array of a known name.
    """
    with _arrays(path) as arrays:
        keys = list(arrays)
    found: dict[str, Reader] = {}
    for split in SPLITS:
        plain = split == "train"
        x = (["x", "images", "data", "arr_0"] if plain else []) + [f"x_{split}"]
        y = (["y", "labels"] if plain else []) + [f"y_{split}"]
        x_key, y_key = (next((k for k in names if k in keys), None) for names in (x, y))
        if x_key:
            found[split] = partial(_read_arrays, path, x_key, y_key)
    if not found:
        raise DataError(
            f"{path.name}: holds {', '.join(sorted(keys)) or 'nothing'}; the data "
            "must be called x, images, data, or x_train and x_test"
        )
    return found


@contextmanager
def _arrays(path: Path) -> Iterator[Mapping[str, Any]]:
    """The arrays of a .npz file by name, that of a .npy file as `x`, while the file is open."""
    try:
        file = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(file, np.ndarray):
            yield {"x": file}
        else:
            with file:
                yield file
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError.caused(path.name, error) from error


def _read_arrays(
    path: Path, x_key: str, y_key: str | None, size: int | None, limit: int | None
) -> Dataset:
    with _arrays(path) as arrays:
        x = np.array(arrays[x_key][:limit])
        y = None if y_key is None else np.array(arrays[y_key][:limit])
    if x.dtype.kind not in "biuf":
        raise DataError(f"{path.name}: {x_key} is of type {x.dtype}; it must hold numbers")
    if x.dtype == np.uint8:
        items, levels = torch.from_numpy(_channels_first(x)), 256
    else:
        items, levels = torch.from_numpy(x.astype(np.float32)), None
    items = items[:, None] if items.ndim == 1 else items
    return Dataset(items, None if y is None else labels(y, path.name), levels, path.name)


def _channels_first(x: np.ndarray) -> np.ndarray:
    """`(N, H, W)` and `(N, H, W, C)` as `(N, C, H, W)`; other shapes as they are."""
    if x.ndim == 3:
        return x[:, None]
    if x.ndim != 4 or x.shape[3] not in (1, 3, 4):
        return x
    _, a, b, c = x.shape
    already = a in (1, 3, 4) and b == c and a != b  # (N, 3, 4, 4) has its channels first
    return x if already else np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def labels(y: np.ndarray, name: str) -> Tensor | None:
    """Integer labels; None where all are negative, the custom for a test set without any."""
    if y.dtype.kind not in "biu":
        raise DataError(f"{name}: the labels are of type {y.dtype}; they must be integers")
    y = y.reshape(-1).astype(np.int64)
    return None if len(y) and y.max() < 0 else torch.from_numpy(y)
