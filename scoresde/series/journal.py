"""The journal of a series that is under way: locked, checked, on the disk batch by batch."""

from __future__ import annotations

import json
import os
import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from .finished import sync, writing
from .plan import Plan, SeriesError

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

Batch: TypeAlias = tuple[int, int, float, bytes]  # start, stop, seconds, rows

_MAGIC = b"scoresde series 1\n"
_HEAD = struct.Struct("<III")
BATCH = struct.Struct("<QQd")


class Journal:
    """The open and locked ``FILE.partial``."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> Journal:
        with writing(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            while not self._hold():
                pass
        return self

    def _hold(self) -> bool:
        """Opens and locks the file; False if its last holder has removed it meanwhile."""
        self.handle = os.fdopen(os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            if fcntl is not None:
                fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(self.handle.fileno()), os.stat(self.file))
        except FileNotFoundError:
            self.handle.close()
            return False
        except BlockingIOError as error:
            self.handle.close()
            raise SeriesError(
                f"{self.file} is in use: another process is at this series"
            ) from error

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # of a full disk, which was said when it was met
            self.handle.close()

    def clear(self) -> None:
        """Forgets everything."""
        self.handle.truncate(0)

    def resume(self, plan: Plan) -> list[Batch]:
        """The finished batches of the plan; begins the journal if there is none."""
        self.handle.seek(0)
        data = self.handle.read()
        if not (data.startswith(_MAGIC) or _MAGIC.startswith(data)):
            raise SeriesError(f"{self.file} is no journal of a series: move it away")
        bodies, damaged = _records(data)
        found: list[Batch] = []
        end = 0
        for body, at in bodies:
            if end == 0:
                plan.agree(json.loads(body), str(self.file))
            elif (record := _batch(body, plan)) is not None:
                found.append(record)
            else:
                damaged = True
                break
            end = at
        if damaged:
            warnings.warn(
                f"{self.file} is damaged from byte {end} of {len(data)} on: "
                "what it held from there is evaluated again",
                stacklevel=3,
            )
        self.handle.truncate(end)
        self.handle.seek(end)
        if end == 0:
            self.handle.write(_MAGIC)
            self.append(json.dumps(plan.identity).encode())
            sync(self.file.parent)
        return found

    def append(self, body: bytes) -> None:
        """Writes a record and waits until it is on the disk."""
        head = struct.pack("<II", len(body), zlib.crc32(body))
        with writing(self.file):
            self.handle.write(head + struct.pack("<I", zlib.crc32(head)) + body)
            self.handle.flush()
            os.fsync(self.handle.fileno())

    def remove(self) -> None:
        """Removes the file, still under the lock where the system lets it."""
        if os.name != "posix":
            self.handle.close()
        self.file.unlink(missing_ok=True)


def _records(data: bytes) -> tuple[list[tuple[bytes, int]], bool]:
    """Whole records and where each ends; whether what follows is damaged, and not just torn."""
    found: list[tuple[bytes, int]] = []
    at = len(_MAGIC)
    while len(data) - at >= _HEAD.size:
        length, check, check_head = _HEAD.unpack_from(data, at)
        # The head has a sum of its own: a damaged length would make the record look torn.
        if zlib.crc32(data[at : at + 8]) != check_head:
            return found, True
        start, at = at + _HEAD.size, at + _HEAD.size + length
        if at > len(data):
            break
        if zlib.crc32(data[start:at]) != check:
            return found, True
        found.append((data[start:at], at))
    return found, False


def _batch(body: bytes, plan: Plan) -> Batch | None:
    """A batch of the plan; None for anything else."""
    if len(body) < BATCH.size:
        return None
    start, stop, took = BATCH.unpack_from(body)
    rows = body[BATCH.size :]
    inside = plan.first <= start < stop <= plan.stop
    blocks = start % plan.block == 0 and (stop % plan.block == 0 or stop == plan.count)
    whole = inside and blocks and len(rows) == (stop - start) * plan.dtype.itemsize
    return (start, stop, took, rows) if whole else None
