"""The bytes of a foreign file: a hard end, tensors filled in place, errors that name the file.

Nothing here trusts a length that the file declares: a window refuses to read past its end before
it allocates, and all that is copied into memory is paid from an allowance of twice the file's
size (bytes may be copied once to decode and once to arrange them), so that no file takes more
than a small multiple of its own size.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..files import CheckpointError

ALIGNMENT = 16  # bytes; the widest element, complex128
LINE = 1000  # bytes; longer than any dotted name
_PICKLES = (b"\x80", b"c", b"(", b"]", b"}")  # without a protocol too, to name what they call


class Source:
    """An open file of `size` bytes and the allowance of memory that is left to it."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size
        self.allowance = 2 * size
        self._map: mmap.mmap | None = None

    def spend(self, nbytes: int) -> None:
        """Take `nbytes` from the allowance; an honest file holds every byte that it asks for."""
        if nbytes > self.allowance:
            raise CheckpointError(
                f"it asks for more memory than its {self.size} bytes can fill, "
                "by naming the same bytes many times or sizes that are not there"
            )
        self.allowance -= nbytes

    def empty(self, nbytes: int) -> Tensor:
        """Unfilled memory, `(nbytes,)` of uint8, paid from the allowance."""
        self.spend(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def mapped(self, start: int, nbytes: int) -> Tensor:
        """Bytes from `start` as `(nbytes,)` of uint8, read from the disk when they are used."""
        if start % ALIGNMENT or nbytes == 0:  # as repacked archives have them
            return Window(self, start, start + nbytes).copied(nbytes)
        if self._map is None:  # private: what is written to a tensor never reaches the file
            self._map = mmap.mmap(self.file.fileno(), self.size, access=mmap.ACCESS_COPY)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes, offset=start)


class Window:
    """The bytes `start..stop` of a source, read in order and never past the end."""

    def __init__(self, source: Source, start: int = 0, stop: int | None = None) -> None:
        self.source = source
        self.at = start
        self.stop = source.size if stop is None else stop

    def __len__(self) -> int:
        return self.stop - self.at

    def _skip(self, nbytes: int) -> int:
        if not 0 <= nbytes <= len(self):
            raise CheckpointError(
                f"it is truncated or damaged: {nbytes} bytes declared, {len(self)} left"
            )
        self.at += nbytes
        return self.at - nbytes

    def read(self, nbytes: int) -> bytes:
        """The next `nbytes` bytes."""
        self.source.file.seek(self._skip(nbytes))
        data = self.source.file.read(nbytes)
        if len(data) != nbytes:
            raise CheckpointError("it became shorter while it was read")
        return data

    def line(self) -> bytes:
        """The next line, without its end."""
        self.source.file.seek(self.at)
        text = self.source.file.readline(min(LINE, len(self)))
        if not text.endswith(b"\n"):
            raise CheckpointError("it is truncated or damaged: a name without an end")
        self.at += len(text)
        return text[:-1]

    def part(self, nbytes: int) -> Window:
        """The next `nbytes` bytes as a window of their own, not read yet."""
        start = self._skip(nbytes)
        return Window(self.source, start, self.at)

    def fill(self, memory: Tensor) -> None:
        """Read the next bytes into `memory`, `(n,)` of uint8."""
        self.source.file.seek(self._skip(len(memory)))
        buffer: Any = memoryview(memory.numpy())  # type: ignore[arg-type]
        if len(memory) and self.source.file.readinto(buffer) != len(memory):  # type: ignore[attr-defined]
            raise CheckpointError("it became shorter while it was read")

    def copied(self, nbytes: int) -> Tensor:
        """The next bytes in memory of their own, `(nbytes,)` of uint8."""
        part = self.part(nbytes)  # refuses before anything is allocated
        memory = self.source.empty(nbytes)
        part.fill(memory)
        return memory


@contextmanager
def opened(path: str | Path) -> Iterator[Window]:
    """The whole of a file; whatever goes wrong inside becomes one line that names the file."""
    path = Path(path)
    try:
        if path.is_dir():
            raise CheckpointError("it is a folder, not a file")
        with path.open("rb") as file:
            window = Window(Source(file, file.seek(0, 2)))
            _refuse_others(window)
            yield window
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: it cannot be read: {error.strerror or error}") from error
    except Exception as error:  # of the kinds that a hostile file can provoke, there is no list
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: it is truncated or damaged: {reason}") from error


def _refuse_others(window: Window) -> None:
    """Say what a file is, where its first bytes show that it is no checkpoint of torch."""
    start = Window(window.source).read(min(len(window), 256))
    if not start:
        raise CheckpointError("it is empty")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            "it is a pointer of git-LFS, not the file itself; fetch it with `git lfs pull`"
        )
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise CheckpointError("it is a web page, not a checkpoint; download the file itself")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= len(window):
        raise CheckpointError("it is a file of safetensors, not a pickle")
    if start[:1] not in _PICKLES and not start.startswith(b"PK"):
        raise CheckpointError("it is no checkpoint: neither an archive of torch.save nor a pickle")
