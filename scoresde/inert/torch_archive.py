"""Where the records of a `torch.save` archive lie, from its directory alone.

The archive is a zip file (PKWARE, APPNOTE 6.3, 2022, pkware.com/appnote) whose records are
stored without compression under one folder: `NAME/data.pkl` and `NAME/data/KEY`, one a storage.
Every size in the directory is checked against the file before a record is read; compressed or
encrypted records, records that overlap, and names that leave the folder, are refused: torch
writes none.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise

from ..files import CheckpointError
from .bytes_of_file import Source, Window

_END, _END64, _LOCATOR = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_ENTRY, _LOCAL = b"PK\x01\x02", b"PK\x03\x04"
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "see the record of 64 bits"
MAX_RECORDS = 200_000
ENCRYPTED = 1


@dataclass(frozen=True)
class Record:
    """One record: its bytes are `start..start + size` of the file."""

    start: int
    size: int


def records(source: Source) -> dict[str, Record]:
    """The records of an archive by their names without the folder, such as `data/0`.

    Raises:
        CheckpointError: for a damaged directory, or one that `torch.save` does not write.
    """
    count, start, size = _directory(source)
    entries = Window(source, start, start + size)
    found: dict[str, Record] = {}
    taken: list[tuple[int, int]] = []
    folder = None
    for _ in range(count):
        name, header, length = _entry(entries)
        first = _first_byte(source, name, header)
        if first + length > start:
            raise CheckpointError(f"its record {name!r} exceeds the file: truncated or damaged")
        top, _, rest = name.partition("/")
        folder = top if folder is None else folder
        if top != folder or not rest or ".." in rest.split("/") or "\\" in name or rest in found:
            raise CheckpointError(f"its archive holds the odd or repeated name {name!r}")
        taken.append((header, first + length))
        found[rest] = Record(first, length)
    taken.sort()
    for (_, stop), (header, _) in pairwise(taken):
        if header < stop:
            raise CheckpointError("its archive has records that overlap")
    return found


def _directory(source: Source) -> tuple[int, int, int]:
    """Number of entries, first byte and size of the directory."""
    at = source.size - 22
    end = Window(source, max(at, 0)).read(min(22, source.size))
    if len(end) < 22 or end[:4] != _END:
        raise CheckpointError("it is truncated or damaged: the archive has no end")
    count, size, start = struct.unpack("<HII", end[10:20])
    if count == _FULL16 or _FULL32 in (size, start):
        place, at = Window(source, at - 20).read(20), at - 20
        if place[:4] != _LOCATOR:
            raise CheckpointError("it is damaged: the archive's directory is not found")
        (at,) = struct.unpack("<Q", place[8:16])
        end = Window(source, at).read(56)
        if end[:4] != _END64:
            raise CheckpointError("it is damaged: the archive's directory is not found")
        count, size, start = struct.unpack("<QQQ", end[32:56])
    if start + size > at or count > min(MAX_RECORDS, size // 46):
        raise CheckpointError("it is damaged: the archive's directory does not fit the file")
    return count, start, size


def _entry(entries: Window) -> tuple[str, int, int]:
    """Name, place of the header and size of the next record in the directory."""
    fixed = entries.read(46)
    flags, method = struct.unpack("<HH", fixed[8:12])
    packed, size, name_size, extra_size, comment_size = struct.unpack("<IIHHH", fixed[20:34])
    (header,) = struct.unpack("<I", fixed[42:46])
    name = entries.read(name_size).decode()
    extra = entries.read(extra_size)
    entries.read(comment_size)
    if fixed[:4] != _ENTRY:
        raise CheckpointError("it is damaged: the archive's directory is broken")
    wide = _wide(extra)
    size = wide.pop(0) if size == _FULL32 else size
    packed = wide.pop(0) if packed == _FULL32 else packed
    header = wide.pop(0) if header == _FULL32 else header
    if method != 0 or flags & ENCRYPTED or packed != size:
        raise CheckpointError(
            f"its record {name!r} is compressed or encrypted, which torch.save never does"
        )
    return name, header, size


def _wide(extra: bytes) -> list[int]:
    """The numbers of 64 bits in an entry's extra field."""
    while len(extra) >= 4:
        kind, length = struct.unpack("<HH", extra[:4])
        if kind == 1:
            return [n for (n,) in struct.iter_unpack("<Q", extra[4 : 4 + length // 8 * 8])]
        extra = extra[4 + length :]
    return []


def _first_byte(source: Source, name: str, header: int) -> int:
    """Where a record's bytes begin, behind its own header."""
    if header > source.size:
        raise CheckpointError(f"its record {name!r} exceeds the file: truncated or damaged")
    local = Window(source, header)
    fixed = local.read(30)
    name_size, extra_size = struct.unpack("<HH", fixed[26:30])
    if fixed[:4] != _LOCAL or fixed[8:10] != b"\0\0" or local.read(name_size) != name.encode():
        raise CheckpointError(f"it is damaged: its record {name!r} is not where it should be")
    return local.at + extra_size
