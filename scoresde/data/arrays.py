"""Read arrays: `.npy`, and `.npz` with keys `x` and `y`, or `x_train`, `y_train`, `x_test`, ...

uint8 is 256 levels, and pictures `(N, H, W)` or `(N, H, W, C)` become `(N, C, H, W)`. Any other
type becomes float32 and keeps its shape: `(N, D)`, `(N, C, L)`, `(N, C, H, W)`, `(N, C, D, H, W)`.
`y` are integers, the classes, or floating-point vectors `(N, d)` that condition the items; `c` in
its place are always such vectors. The `y` or `c` of `x.npy` lie beside it in `y.npy` or `c.npy`,
those of `faces.npy` in `faces_y.npy` or `faces_c.npy`; a folder of such files is one set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoresde.data.dataset import SPLITS, DataError
from scoresde.data.items import Items, Reader, Terms, names_of_classes
from scoresde.data.stored import Stored, rows, stored


def open_arrays(path: Path) -> dict[str, Reader]:
    """The splits of a .npy or .npz file, or of a folder of .npy files, and what reads each.

    Raises:
        DataError: a damaged file, pickled objects, or no array of a known name.
    """
    arrays = _arrays(path)
    found: dict[str, Reader] = {}
    for split in SPLITS:
        plain = split == "train"
        x = (["x", "images", "data", "arr_0"] if plain else []) + [f"x_{split}"]
        y = (["y", "labels"] if plain else []) + [f"y_{split}"]
        y += (["c"] if plain else []) + [f"c_{split}"]
        x_key, y_key = (next((k for k in names if k in arrays), None) for names in (x, y))
        if x_key:
            found[split] = partial(_read_arrays, path.name, arrays, x_key, y_key)
    if not found:
        raise DataError(
            f"{path.name}: holds {', '.join(sorted(arrays)) or 'nothing'}; the data "
            "must be called x, images, data, or x_train and x_test"
        )
    return found


def is_pair(folder: Path) -> bool:
    """Whether a folder holds arrays of one set, `x.npy` or `x_train.npy`."""
    return any((folder / f"{name}.npy").is_file() for name in ("x", "x_train"))


def _arrays(path: Path) -> Mapping[str, Stored]:
    """The arrays by name, with those that lie beside a .npy."""
    if path.is_dir():
        return {file.stem: stored(file)["x"] for file in sorted(path.glob("*.npy"))}
    arrays = stored(path)
    if path.suffix.lower() == ".npy":
        stem = "" if path.stem == "x" else f"{path.stem}_"
        if path.stem.startswith("x_"):  # x_train.npy and y_train.npy
            beside = {key: path.with_name(f"{key}{path.stem[1:]}.npy") for key in ("y", "c")}
        else:
            beside = {key: path.with_name(f"{stem}{key}.npy") for key in ("y", "c")}
        arrays |= {key: stored(file)["x"] for key, file in beside.items() if file.is_file()}
    return arrays


@dataclass(frozen=True, eq=False)
class ArrayItems(Items):
    """Rows of an array, with those of another as their classes or vectors."""

    name: str
    x: Stored | np.ndarray
    y: Stored | np.ndarray | None
    count: int
    shape: tuple[int, ...]
    levels: int | None
    class_names: tuple[str, ...] | None
    vectors: int | None

    def __len__(self) -> int:
        return self.count

    def where(self, i: int) -> str:
        """The number of a row."""
        return f"{self.name}, row {i}"

    def read(self, index: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Rows, `(b, *shape)`, uint8 or float32, and their classes or vectors."""
        x = _items(rows(self.x, index))
        if self.y is None:
            return x, None
        y = rows(self.y, index)
        if self.vectors is not None:
            return x, torch.from_numpy(y.reshape(len(index), -1).astype(np.float32))
        return x, torch.from_numpy(y.reshape(-1).astype(np.int64))


def _read_arrays(
    name: str, arrays: Mapping[str, Stored], x_key: str, y_key: str | None, terms: Terms
) -> ArrayItems:
    array = arrays[x_key]
    if array.dtype.kind not in "biuf":
        raise DataError(f"{name}: {x_key} is of type {array.dtype}; it must hold numbers")
    if not array.shape:
        raise DataError(f"{name}: {x_key} is one number; it must be an array (N, ...)")
    x = array.at_random(terms)
    shape = tuple(_items(rows(x, slice(0, 1))).shape[1:])
    y = None if y_key is None else arrays[y_key].at_random(terms)
    names, vectors = None, None
    if y is not None:
        names, vectors = _kind(name, y, str(y_key), array.shape[0])
    count = min(array.shape[0], array.shape[0] if terms.limit is None else terms.limit)
    if not count or 0 in shape:
        raise DataError(
            f"{name}: x has shape {array.shape}; it must be (N, *shape) with at least one item "
            "and no empty axis"
        )
    levels = 256 if array.dtype == np.uint8 else None
    y = y if names or vectors else None
    return ArrayItems(name, x, y, count, shape, levels, names, vectors)


def _kind(
    name: str, y: Stored | np.ndarray, key: str, count: int
) -> tuple[tuple[str, ...] | None, int | None]:
    """Class names, or the dimension of the vectors, of what an array of labels holds."""
    given = key == "c" or key.startswith("c_")
    vectors = (y.dtype.kind in "biuf" and given) or (y.dtype.kind == "f" and len(y.shape) == 2)
    fits = len(y.shape) in (1, 2) if vectors else int(np.prod(y.shape[1:])) == 1
    if not y.shape or y.shape[0] != count or (not fits and y.dtype.kind in "biuf"):
        raise DataError(
            f"{name}: labels are {y.dtype} of shape {y.shape}; they must be integers of shape "
            f"({count},), one an item, or floating-point vectors ({count}, d)"
        )
    if vectors:
        return None, int(np.prod(y.shape[1:]))
    check_labels(y.dtype, name)
    values = y.open() if isinstance(y, Stored) else y
    return names_of_classes(int(values.min()), int(values.max()), name), None


def _items(x: np.ndarray) -> Tensor:
    """Rows as items: uint8 with the channels first, else float32."""
    if x.dtype == np.uint8:
        items = torch.from_numpy(_channels_first(x))
    else:
        items = torch.from_numpy(x.astype(np.float32))
    return items[:, None] if items.ndim == 1 else items


def _channels_first(x: np.ndarray) -> np.ndarray:
    """`(N, H, W)` and `(N, H, W, C)` as `(N, C, H, W)`; other shapes as they are."""
    if x.ndim == 3:
        return x[:, None]
    if x.ndim != 4 or x.shape[3] not in (1, 3, 4):
        return x
    _, a, b, c = x.shape
    already = a in (1, 3, 4) and b == c and a != b  # (N, 3, 4, 4) has its channels first
    return x if already else np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def check_labels(kind: np.dtype, name: str) -> None:
    """Whether numbers of a type can be classes.

    Raises:
        DataError: they cannot.
    """
    if kind.kind not in "biu":
        raise DataError(
            f"{name}: the labels are of type {kind}; they must be integers, or vectors (N, d)"
        )


def labels(y: np.ndarray, name: str) -> Tensor | None:
    """Integer labels; None where all are negative, the custom for a test set without any."""
    check_labels(y.dtype, name)
    y = y.reshape(-1).astype(np.int64)
    return None if len(y) and y.max() < 0 else torch.from_numpy(y)
