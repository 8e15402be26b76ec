"""Records of a stream, still encoded, and the one form that their items have once decoded."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoresde.data.pictures import decode
from scoresde.data.source import DataError, UnreadableError

SURVEYED = 64  # records at the head of a stream that tell its shape and whether it has colours


class Record(NamedTuple):
    """One item as it was stored.

    Args:
        where: its name, for messages.
        parts: what it holds of "picture" (encoded), "array" (`.npy`, or numbers), "label" (text,
            or an integer), "vector" (`.npy`, or numbers) and "json" (which may hold both).
    """

    where: str
    parts: Mapping[str, Any]


class Item(NamedTuple):
    """A decoded item `x`, `(*shape)`, its class or vector, and its name."""

    x: np.ndarray
    y: int | np.ndarray | None
    where: str


@dataclass(frozen=True)
class Form:
    """What all items of a stream share.

    Args:
        name: of the stream, for messages.
        shape: of one item.
        levels: 256 for pictures and arrays of uint8; None for continuous data.
        size: pictures are centre-cropped and resized to `size x size`.
        classes: number of classes; None where the classes are not used.
        vectors: dimension of the vectors that condition the items; None without any.
    """

    name: str
    shape: tuple[int, ...]
    levels: int | None
    size: int | None = None
    classes: int | None = None
    vectors: int | None = None

    @property
    def nbytes(self) -> int:
        """The size of a decoded item."""
        return math.prod(self.shape) * (1 if self.levels else 4)

    def item(self, record: Record) -> Item:
        """The item of a record, in this form.

        Raises:
            UnreadableError: it is damaged, of another shape or without its class.
            DataError: its class is none of `classes`.
        """
        x, where = values(record, self.size), record.where
        if x.dtype != (np.uint8 if self.levels else np.float32):
            raise UnreadableError(f"{where}: holds {x.dtype}, unlike the first items")
        if "picture" in record.parts and len(self.shape) == 3:
            x = _coloured(x, self.shape[0])
        if x.shape != self.shape:
            raise UnreadableError(f"{where}: has shape {x.shape}, the first items {self.shape}")
        if self.classes is not None:
            return Item(x, self._class(record), where)
        if self.vectors is None:
            return Item(x, None, where)
        y = vector(record)
        if y is None or y.shape != (self.vectors,) or not np.isfinite(y).all():
            raise UnreadableError(f"{where}: has no finite vector of {self.vectors} numbers")
        return Item(x, y, where)

    def _class(self, record: Record) -> int:
        label = label_of(record)
        if label is None:
            raise UnreadableError(f"{record.where}: has no label")
        if not 0 <= label < (self.classes or 0):
            raise DataError(
                f"{record.where}: its label is {label}, but {self.name} has {self.classes} "
                f"classes, 0..{(self.classes or 0) - 1}; set data.classes to the right number"
            )
        return label

    def stack(self, items: Sequence[Item]) -> tuple[Tensor, Tensor | None]:
        """Items as `(b, *shape)`, and their classes `(b,)` or vectors `(b, d)`."""
        x = torch.from_numpy(np.stack([item.x for item in items]))
        if self.classes is None and self.vectors is None:
            return x, None
        y = np.stack([np.asarray(item.y) for item in items])
        return x, torch.from_numpy(y.astype(np.float32 if self.vectors else np.int64))


def survey(name: str, records: Sequence[Record], size: int | None, classes: int | None) -> Form:
    """The form of a stream, from the records at its head; those that cannot be read do not count.

    Raises:
        DataError: none can be read, or `size` or `classes` is given without pictures or labels.
    """
    found: list[tuple[np.ndarray, Record]] = []
    error: UnreadableError | None = None
    for record in records:
        try:
            found.append((values(record, size), record))
        except UnreadableError as unreadable:
            error = error or unreadable
    if not found:
        raise DataError(str(error) if error else f"{name}: holds no items (pictures or arrays)")
    first, head = found[0]
    shape = first.shape
    if "picture" in head.parts:
        coloured = any(x.ndim == 3 and x.shape[0] == 3 for x, r in found if "picture" in r.parts)
        shape = (3 if coloured else 1, *shape[1:])
    elif size is not None:
        raise DataError(
            f"{name}: data.size resizes pictures; items of shape {shape} are taken as they are, "
            "leave it out"
        )
    levels = 256 if first.dtype == np.uint8 else None
    labels = label_of(head)
    if labels is None and classes is not None:
        raise DataError(f"{head.where}: has no label, but data.classes is {classes}")
    y = vector(head) if labels is None else None
    return Form(name, shape, levels, size, classes, None if y is None else len(y))


def values(record: Record, size: int | None = None) -> np.ndarray:
    """The decoded item, uint8 with channels first, or float32.

    Raises:
        UnreadableError: it cannot be read, or holds values that are not finite.
    """
    where, parts = record
    if "picture" in parts:
        try:
            x = decode(where, lambda: parts["picture"], size)
        except DataError as error:  # more than 8 bits
            raise UnreadableError(str(error)) from error
        return x[None] if x.ndim == 2 else x.transpose(2, 0, 1)
    if "array" not in parts:
        raise UnreadableError(f"{where}: holds no picture and no array")
    x = _numbers(where, parts["array"])
    if x.dtype == np.uint8:
        return _channels_first(x)
    x = np.atleast_1d(x.astype(np.float32))
    if not np.isfinite(x).all():
        raise UnreadableError(f"{where}: holds values that are not finite in float32")
    return x


def label_of(record: Record) -> int | None:
    """The class of a record, None without one.

    Raises:
        UnreadableError: it is no whole number.
    """
    found = record.parts.get("label", _json(record).get("label"))
    try:
        return None if found is None else int(found)
    except (ValueError, TypeError) as error:
        raise UnreadableError(f"{record.where}: its label is {found!r}, no integer") from error


def vector(record: Record) -> np.ndarray | None:
    """The vector of a record, `(d,)`, float32; None without one.

    Raises:
        UnreadableError: it holds no numbers.
    """
    found = record.parts.get("vector", _json(record).get("vector"))
    if found is None:
        return None
    return np.atleast_1d(_numbers(record.where, found).astype(np.float32)).reshape(-1)


def _json(record: Record) -> dict[str, Any]:
    if "json" not in record.parts:
        return {}
    try:
        found = json.loads(record.parts["json"])
    except ValueError as error:
        raise UnreadableError.caused(f"{record.where}: its json", error) from error
    return found if isinstance(found, dict) else {}


def _numbers(where: str, stored: Any) -> np.ndarray:
    try:
        x = stored
        if isinstance(stored, bytes):
            x = np.load(io.BytesIO(stored), allow_pickle=False)
        x = np.asarray(x)
    except (ValueError, EOFError, OSError) as error:
        raise UnreadableError.caused(f"{where}: its array", error) from error
    if x.dtype.kind not in "biuf" or not x.size:
        raise UnreadableError(f"{where}: holds no numbers ({x.dtype}, shape {x.shape})")
    return x


def _channels_first(x: np.ndarray) -> np.ndarray:
    """`(H, W)` and `(H, W, C)` as `(C, H, W)`; other shapes as they are."""
    if x.ndim == 2:
        return x[None]
    last = x.ndim == 3 and x.shape[2] in (1, 3, 4) and x.shape[0] not in (1, 3, 4)
    return np.ascontiguousarray(x.transpose(2, 0, 1)) if last else x


def _coloured(x: np.ndarray, channels: int) -> np.ndarray:
    """A picture `(C, H, W)` with the channels that a stream has: 1, or 3."""
    if len(x) == channels:
        return x
    if channels == 3:
        return np.repeat(x, 3, axis=0)
    from PIL import Image

    return np.asarray(Image.fromarray(np.ascontiguousarray(x.transpose(1, 2, 0))).convert("L"))[
        None
    ]
