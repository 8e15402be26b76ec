"""Read a folder of latents (what an encoder made of data): `.npy`, `.npz` or `.safetensors` files.

The array is called `x`, `latents` or `arr_0`; `y` beside it are classes or, floating-point,
vectors that condition the items. An array of one or three axes is one item, a vector or `(C, H,
W)`; any other is rows of items, `(N, D)`, `(N, C, H, W)`, `(N, C, D, H, W)`. All are float32 and
of one shape. Folders are splits and classes, as those of pictures are.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.data.dataset import DataError, spread
from scoresde.data.items import Items, Reader, Terms, names_of_classes
from scoresde.data.source import UnreadableError
from scoresde.data.stored import rows, stored
from scoresde.data.tree import Tree, splits_of

LATENTS = (".npy", ".npz", ".safetensors")
KEYS = ("x", "latents", "arr_0")


def open_latents(root: Path) -> dict[str, Reader]:
    """The splits of a folder of latents, or of one file of them, and what reads each.

    Returns:
        nothing where a folder holds none.

    Raises:
        DataError: a file beside the folders of the splits.
    """
    if root.is_file():
        tree = Tree([root.name], 0, ())
        return {"train": partial(_read_latents, root.name, root.parent, tree)}
    found = (path.relative_to(root) for path in root.rglob("*") if path.suffix in LATENTS)
    names = sorted(n.as_posix() for n in found if not any(p.startswith(".") for p in n.parts))
    trees = splits_of(root.name, names)
    return {split: partial(_read_latents, root.name, root, trees[split]) for split in trees}


class _File:
    """One file: its array and what conditions it, mapped or read as it is asked for."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            self.arrays: Mapping[str, Any] = (
                _slices(path) if path.suffix == ".safetensors" else stored(path)
            )
        except UnreadableError:
            raise
        except Exception as error:  # readers raise whatever they like
            raise UnreadableError.caused(f"{self.name}: cannot be read", error) from error
        key = next((k for k in KEYS if k in self.arrays), None)
        if key is None:
            raise DataError(
                f"{self.name}: holds {', '.join(sorted(self.arrays)) or 'nothing'}; "
                f"latents must be called {', '.join(KEYS)}"
            )
        self.key = key
        self.shape = self._shape(key)

    def _shape(self, key: str) -> tuple[int, ...]:
        array = self.arrays[key]
        return tuple(array.get_shape() if hasattr(array, "get_shape") else array.shape)

    @property
    def alone(self) -> bool:
        """Whether the array is one item."""
        return len(self.shape) in (1, 3)

    def take(self, key: str, row: int | None) -> Tensor:
        """One row of an array, or all of it."""
        array = self.arrays[key]
        try:
            if hasattr(array, "get_shape"):
                found: Tensor = array[:] if row is None else array[row : row + 1][0]
                return found
            if array.offset is None and row is not None:
                raise DataError(
                    f"{self.name}: holds many items and is compressed; "
                    "save it by np.savez, not np.savez_compressed"
                )
            whole: Any = () if not array.shape else slice(None)
            return torch.from_numpy(np.asarray(rows(array, whole if row is None else row)))
        except Exception as error:
            if type(error) is DataError and "compressed" in str(error):
                raise
            raise UnreadableError.caused(f"{self.name}: cannot be read", error) from error

    def condition(self, row: int | None) -> Tensor | None:
        """The class (a scalar, int64) or the vector (float32) of an item."""
        if "y" not in self.arrays:
            return None
        y = self.take("y", row)
        if y.is_floating_point() and y.ndim == 1:
            return y.float()
        if y.is_floating_point() or y.numel() != 1:
            raise DataError(
                f"{self.name}: its y is {y.dtype} of shape {tuple(y.shape)} an item; it must be "
                "a whole number or a floating-point vector"
            )
        return y.reshape(()).long()


def _slices(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    file = safe_open(path, framework="pt")
    return {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - it is no dict


@lru_cache(maxsize=64)
def _open(path: Path, process: int) -> _File:
    """A file as a process has it open."""
    return _File(path)


@dataclass(frozen=True, eq=False)
class LatentItems(Items):
    """Latents of one shape, whole files or rows of them."""

    name: str
    root: Path
    names: Sequence[str]
    starts: Sequence[int] | None  # rows before each file; None where a file is an item
    count: int
    shape: tuple[int, ...]
    y: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    vectors: int | None = None
    levels: int | None = None

    def __len__(self) -> int:
        return self.count

    def _at(self, i: int) -> tuple[str, int | None]:
        if self.starts is None:
            return self.names[i], None
        which = bisect_right(self.starts, i) - 1
        return self.names[which], i - self.starts[which]

    def where(self, i: int) -> str:
        """The name of a file, and which row of it."""
        name, row = self._at(i)
        return name if row is None else f"{name}, row {row}"

    def read(self, index: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Latents, `(b, *shape)`, float32, and their classes or vectors."""
        x = torch.empty(len(index), *self.shape)
        conditions: list[Tensor] = []
        for to, i in zip(x, index, strict=True):
            name, row = self._at(i)
            file = _open(self.root / name, os.getpid())
            item = file.take(file.key, row)
            if tuple(item.shape) != self.shape:
                raise DataError(
                    f"{self.names[0]} has items of shape {self.shape}, "
                    f"but {self.where(i)} is of {tuple(item.shape)}"
                )
            to.copy_(item)
            if self.y is None and (self.class_names or self.vectors):
                y = file.condition(row)
                if y is None or tuple(y.shape) != (() if self.class_names else (self.vectors,)):
                    raise DataError(f"{self.where(i)}: has no y like that of {self.names[0]}")
                conditions.append(y)
        if self.y is not None:
            return x, self.y[torch.as_tensor(index)]
        return x, torch.stack(conditions) if conditions else None


def _read_latents(name: str, root: Path, tree: Tree, terms: Terms) -> LatentItems:
    names, first = list(tree.names), _first(root, tree.names)
    if first.alone:
        if terms.limit is not None:
            names = [names[i] for i in spread(len(names), terms.limit).tolist()]
        y = tree.labels(names)
        items = LatentItems(name, root, names, None, len(names), first.shape, y)
    else:
        files = [_File(root / n) for n in names]
        counts = [file.shape[0] for file in files]
        starts = [0, *accumulate(counts)]
        count = starts.pop()
        if not count:
            raise DataError(f"{name}: holds no latents, its arrays are empty")
        y = tree.labels(names)
        y = None if y is None else y.repeat_interleave(torch.tensor(counts))
        count = min(count, count if terms.limit is None else terms.limit)
        items = LatentItems(name, root, names, starts, count, first.shape[1:], y)
    return _conditioned(items, first, tree)


def _first(root: Path, names: Sequence[str]) -> _File:
    """The first file that can be read."""
    for k, name in enumerate(names):
        try:
            return _File(root / name)
        except UnreadableError:
            if k == min(len(names), 50) - 1:
                raise
    raise DataError(f"{root.name}: holds no latents")


def _conditioned(items: LatentItems, first: _File, tree: Tree) -> LatentItems:
    """With the classes or vectors that the files themselves hold, else those of the folders."""
    if "y" not in first.arrays:
        return replace(items, class_names=tree.classes if items.y is not None else None)
    y = first.condition(None if items.starts is None else 0)
    assert y is not None
    if y.ndim:
        return replace(items, y=None, vectors=len(y))
    low, high = 0, -1
    for name in items.names:
        try:
            file = _File(items.root / name)
            if "y" in file.arrays:
                values = file.take("y", None)
                low, high = min(low, int(values.min())), max(high, int(values.max()))
        except UnreadableError:
            continue
    return replace(items, y=None, class_names=names_of_classes(low, high, items.name))
