"""Read IDX, the format of MNIST and Fashion-MNIST: raw bytes behind a header, gzipped or not.

A file begins with two zero bytes, the type of its entries (8: unsigned bytes) and the number of
its axes, then the length of each axis, 32 bits big-endian; the entries follow, last axis fastest.
A folder holds `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the same of `t10k`, the
test split; some copies write a dot before `idx`. A file by itself is images without labels.

- "The MNIST database of handwritten digits", LeCun, Cortes, Burges, 1998,
  http://yann.lecun.com/exdb/mnist/
- "Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms", Xiao,
  Rasul, Vollgraf, 2017, https://arxiv.org/abs/1708.07747
"""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch

from scoresde.data.arrays import labels
from scoresde.data.dataset import DataError, Dataset
from scoresde.data.items import Reader, Terms

MEMBER = re.compile(
    r"(?P<part>train|t10k)-(?P<kind>images[-.]idx3|labels[-.]idx1)-ubyte(\.gz)?", re.I
)
ALONE = re.compile(r"(.*[-.])?idx\d-ubyte(\.gz)?", re.I)
SPLIT_OF = {"train": "train", "t10k": "test"}
UNSIGNED_BYTE = 8
GZIP = b"\x1f\x8b"
CHUNK = 1 << 20  # bytes


def open_idx(root: Path) -> dict[str, Reader]:
    """The splits of a folder of IDX files, or of one file of images, and what reads each.

    Returns:
        nothing where no name is that of an IDX file.

    Raises:
        DataError: labels without their images.
    """
    if not root.is_dir():
        alone = ALONE.fullmatch(root.name)
        return {"train": partial(_read_idx, root.name, root, None)} if alone else {}
    members: dict[tuple[str, str], Path] = {}
    for file in sorted(root.iterdir()):  # the unpacked copy comes before its .gz
        match = MEMBER.fullmatch(file.name)
        if match and file.is_file():  # some archives unpack into folders of these names
            members.setdefault((match["part"].lower(), match["kind"][:6].lower()), file)
    found: dict[str, Reader] = {}
    for part, split in SPLIT_OF.items():
        images, classes = members.get((part, "images")), members.get((part, "labels"))
        if images:
            found[split] = partial(_read_idx, root.name, images, classes)
        elif classes:
            raise DataError(
                f"{classes.name}: its images are missing; "
                f"{part}-images-idx3-ubyte or .gz must lie beside it"
            )
    return found


def _read_idx(name: str, images: Path, classes: Path | None, terms: Terms) -> Dataset:
    y, limit = None, terms.limit
    if classes is not None:
        there, wanted = _axes(classes, 1)[0], _axes(images, 3)[0]
        if there != wanted:
            raise DataError(f"{classes.name}: has {there} labels for {wanted} images")
        y = labels(_entries(classes, 1, limit), classes.name)
    x = torch.from_numpy(_entries(images, 3, limit)[:, None])
    return Dataset(x, y, 256, name)


def _axes(path: Path, axes: int) -> tuple[int, ...]:
    with _stream(path) as stream:
        return _header(stream, path.name, axes)


def _entries(path: Path, axes: int, limit: int | None) -> np.ndarray:
    """The first `limit` items, after the whole file has been found as long as its header says."""
    with _stream(path) as stream:
        shape = _header(stream, path.name, axes)
        said = math.prod(shape)
        kept = min(shape[0], shape[0] if limit is None else limit)
        if not isinstance(stream, gzip.GzipFile):  # known before anything is read
            _agree(path.name, shape, os.fstat(stream.fileno()).st_size - stream.tell())
        entries, there = bytearray(), 0
        # A packed length is known only at the end: memory grows with what is there, to `said`.
        while there < said and (chunk := stream.read(min(CHUNK, said - there))):
            entries += chunk[: max(kept * math.prod(shape[1:]) - there, 0)]
            there += len(chunk)
        _agree(path.name, shape, there + len(stream.read(1)))  # gzip checks its sum at the end
    return np.frombuffer(entries, np.uint8).reshape(kept, *shape[1:])


def _header(stream: BinaryIO, name: str, axes: int) -> tuple[int, ...]:
    expected = bytes((0, 0, UNSIGNED_BYTE, axes))
    what = "images" if axes == 3 else "labels"
    magic = stream.read(4)
    if magic != expected:
        raise DataError(
            f"{name}: begins with {magic.hex(' ') or 'nothing'}; "
            f"an IDX file of {what} begins with {expected.hex(' ')}"
        )
    lengths = stream.read(4 * axes)
    if len(lengths) != 4 * axes:
        raise DataError(f"{name}: ends within its header of {4 + 4 * axes} bytes")
    shape = struct.unpack(f">{axes}I", lengths)
    if 0 in shape:
        raise DataError(f"{name}: is empty, its {what} are {_written(shape)}")
    return shape


def _agree(name: str, shape: tuple[int, ...], there: int) -> None:
    said = math.prod(shape)
    if there != said:
        has = f"only {there}" if there < said else "more"
        raise DataError(
            f"{name}: its header says {_written(shape)}, {said} bytes, but {has} follow; "
            "it is damaged or cut short, fetch it again"
        )


def _written(shape: tuple[int, ...]) -> str:
    return "x".join(str(length) for length in shape)


@contextmanager
def _stream(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked if they are gzipped, whatever its name says."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == GZIP
            raw.seek(0)
            if not packed:
                yield raw
                return
            with gzip.GzipFile(fileobj=raw) as stream:
                yield cast(BinaryIO, stream)
    except DataError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise DataError.caused(path.name, error) from error
