"""Arrays on disk, mapped into memory where they lie: `.npy`, and members of `.npz`.

An uncompressed member of a .npz is a .npy inside the file, and is mapped there. A compressed one
cannot be read at random: it is read whole where it fits the memory granted, else unpacked once.
"""

from __future__ import annotations

import math
import os
import shutil
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from scoresde.data.dataset import DataError
from scoresde.data.items import Terms, unpacked

LOCAL_HEADER = 30  # bytes of a zip's before the name of a member


@dataclass(frozen=True)
class Stored:
    """An array in a file; small, and the same in any process.

    Args:
        path: of a .npy or .npz.
        shape: of the array.
        dtype: of its numbers.
        offset: bytes before them; None where they are packed.
        fortran: whether the first axis is the fastest.
        key: of a member of a .npz.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int | None
    fortran: bool = False
    key: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    def open(self) -> np.ndarray:
        """The array, mapped if its numbers lie in the file as they are, else read.

        Raises:
            DataError: a file that is shorter than it says, or is gone.
        """
        try:
            if self.offset is not None:
                return _mapped(self, os.getpid())
            with np.load(self.path, allow_pickle=False) as arrays:
                return arrays[self.key]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError.caused(self.path.name, error) from error

    def at_random(self, terms: Terms) -> Stored | np.ndarray:
        """What can be read at random: the same, or what a packed array holds."""
        if self.offset is not None:
            return self
        if terms.fits(self.nbytes):
            return self.open()

        def write(to: Path) -> None:
            with (
                zipfile.ZipFile(self.path) as archive,
                archive.open(f"{self.key}.npy") as member,
                to.open("wb") as file,
            ):
                shutil.copyfileobj(member, file, 1 << 20)

        return stored(unpacked([self.path], str(self.key), write))["x"]


@lru_cache(maxsize=64)
def _mapped(stored: Stored, process: int) -> np.ndarray:
    """The array as a process has it open."""
    order = "F" if stored.fortran else "C"
    if not math.prod(stored.shape):
        return np.empty(stored.shape, stored.dtype)
    return np.memmap(stored.path, stored.dtype, "r", stored.offset or 0, stored.shape, order)  # type: ignore[call-overload]


def stored(path: Path) -> dict[str, Stored]:
    """The arrays of a .npz by name; that of a .npy as "x".

    Raises:
        DataError: a damaged file, or pickled objects.
    """
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                file.seek(0)
                found = {"x": _header(path, file, None, True)}
            else:
                found = _members(path, file)
        for array in found.values():
            if array.offset is not None and array.offset + array.nbytes > path.stat().st_size:
                raise ValueError("it is cut short")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, struct.error, zlib.error) as error:
        raise DataError.caused(path.name, error) from error
    return found


def _members(path: Path, file: IO[bytes]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                continue
            key = info.filename[: -len(".npy")]
            plain = info.compress_type == zipfile.ZIP_STORED
            if plain:  # its numbers lie in the file itself
                file.seek(info.header_offset)
                name, extra = struct.unpack("<HH", file.read(LOCAL_HEADER)[26:30])
                file.seek(info.header_offset + LOCAL_HEADER + name + extra)
                found[key] = _header(path, file, key, True)
            else:
                with archive.open(info) as member:
                    found[key] = _header(path, member, key, False)
    return found


def _header(path: Path, file: IO[bytes], key: str | None, plain: bool) -> Stored:
    """The array whose .npy header begins here."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which are not read")
    return Stored(path, shape, dtype, file.tell() if plain else None, fortran, key)


def rows(array: Stored | np.ndarray, index: Any) -> np.ndarray:
    """A copy of `array[index]`."""
    return np.array((array.open() if isinstance(array, Stored) else array)[index])
