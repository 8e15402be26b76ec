"""Shards of a stream as tar files: members with one stem, one after another, are one item.

The convention is WebDataset's: `000017.png` with `000017.cls` (an integer as text) or
`000017.json` (with "label" or "vector"); `000017.npy` for arrays; `000017.vec.npy` for vectors.
A stem ends at the first dot of a file's name. Other members are passed over.
"""

from __future__ import annotations

import glob
import io
import itertools
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from scoresde.data.dataset import SPLITS, DataError
from scoresde.data.stream_items import Record

PARTS = {
    **dict.fromkeys(("png", "jpg", "jpeg", "webp"), "picture"),
    "npy": "array",
    "cls": "label",
    "vec.npy": "vector",
    "json": "json",
}
SPLIT = re.compile(r"(" + "|".join(SPLITS) + r")(?![a-z])", re.IGNORECASE)
BRACES = re.compile(r"\{([^{}]+)\}")


class DamagedError(DataError):
    """A shard that ends before it should; what came before is good."""


class Cursor(Protocol):
    """A place in a shard."""

    def __next__(self) -> Record:
        """The next record.

        Raises:
            StopIteration: there is none.
            DamagedError: the rest of the shard cannot be read.
        """

    def position(self) -> Any:
        """Where the next record begins, as JSON; `Shards.open` takes it."""

    def close(self) -> None:
        """Closes the file."""


class Shards(Protocol):
    """The parts of a stream, in a fixed order; it can be pickled, and reads in any process."""

    @property
    def name(self) -> str:
        """What the data is called in reports."""

    @property
    def size(self) -> int | None:
        """Number of items, if it is known."""

    def __len__(self) -> int: ...

    def open(self, shard: int, at: Any = None) -> Cursor:
        """A shard from a position on; None for its start."""


@dataclass(frozen=True)
class TarShards:
    """Tar files as the shards of a stream."""

    name: str
    paths: tuple[Path, ...]
    size: int | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, shard: int, at: int | None = None) -> Cursor:
        """A shard from the byte `at` on, where a record begins."""
        return _TarCursor(self.paths[shard], at or 0)


class _TarCursor:
    def __init__(self, path: Path, at: int) -> None:
        self._path, self._end = path, at
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise DataError.caused(path.name, error) from error
        self._members = self._read(at)
        self._ahead: tuple[int, str, str, bytes] | None = None
        self._damage: DamagedError | None = None
        self._advance()

    def __next__(self) -> Record:
        while self._ahead is not None:
            key, parts = self._ahead[1], {}
            while self._ahead is not None and self._ahead[1] == key:
                _, _, suffix, content = self._ahead
                if suffix in parts:
                    break  # two items of one name
                parts[suffix] = content
                self._advance()
            known = {PARTS[suffix]: content for suffix, content in parts.items()}
            if "picture" in known or "array" in known:
                return Record(f"{self._path.name}/{key}", known)
        if self._damage is not None:
            raise self._damage
        raise StopIteration

    def position(self) -> int:
        return self._end if self._ahead is None else self._ahead[0]

    def close(self) -> None:
        self._file.close()

    def _advance(self) -> None:
        try:
            self._ahead = next(self._members, None)
        except DamagedError as error:
            self._ahead, self._damage = None, error
        except OSError as error:
            raise DataError.caused(self._path.name, error) from error

    def _read(self, at: int) -> Iterator[tuple[int, str, str, bytes]]:
        """Members of interest from the byte `at` on: where each begins, stem, suffix, content."""
        length = self._file.seek(0, io.SEEK_END)
        self._file.seek(at)
        try:
            tar = tarfile.TarFile(fileobj=self._file, mode="r")
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it remembers them all
                self._end = member.offset
                key, suffix = _stem(member.name)
                if not member.isreg() or suffix not in PARTS:
                    continue
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError("unexpected end of data")
                self._file.seek(member.offset_data)
                content = self._file.read(member.size)
                yield member.offset, key, suffix, content
        except (tarfile.TarError, ValueError, OverflowError) as error:  # sizes beyond all bounds
            raise self._damaged(str(error)) from error
        self._end = tar.offset
        self._file.seek(tar.offset)  # a header that makes no sense only ends the loop above
        if self._file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise self._damaged(f"no member begins at byte {tar.offset}, and no end mark either")

    def _damaged(self, why: str) -> DamagedError:
        return DamagedError(
            f"{self._path.name}: is cut short or damaged ({why}); what comes before is used"
        )


def _stem(name: str) -> tuple[str, str]:
    """The stem of a member and its suffix; no suffix for hidden ones."""
    path = PurePosixPath(name)
    base, _, suffix = path.name.partition(".")
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return (path.parent / base).as_posix(), "" if hidden else suffix.lower()


def open_tars(source: str) -> dict[str, TarShards] | None:
    """The splits of a .tar file, a folder of them, or a pattern with braces or stars.

    A folder's files or sub-folders that are called test..., val... or validation... are splits of
    their own; so are those beside the files that a pattern names, if these are called train....

    Returns:
        None where the source names no tar files.

    Raises:
        DataError: a file of the pattern is missing, or nothing matches it.
    """
    root = Path(source)
    name = root.name
    if root.is_dir():
        paths = sorted(root.glob("*.tar")) + sorted(root.glob("*/*.tar"))
        below = {p: SPLIT.match(p.relative_to(root).parts[0]) for p in paths}
        return _splits(name, {p: m[1].lower() if m else "train" for p, m in below.items()})
    if not source.endswith(".tar"):
        return None
    paths = _expanded(source)
    if paths and all((m := SPLIT.match(p.name)) and m[1].lower() == "train" for p in paths):
        beside = sorted({q for p in paths for q in p.parent.glob("*.tar")} - set(paths))
        named = {p: m[1].lower() for p in beside if (m := SPLIT.match(p.name))}
        held = {p: split for p, split in named.items() if split != "train"}
        return _splits(name, dict.fromkeys(paths, "train") | held)
    return _splits(name, dict.fromkeys(paths, "train"))


def _splits(name: str, found: dict[Path, str]) -> dict[str, TarShards] | None:
    splits: dict[str, list[Path]] = {}
    for path, split in found.items():
        splits.setdefault(split, []).append(path)
    return {s: TarShards(name, tuple(paths)) for s, paths in splits.items()} or None


def _expanded(source: str) -> list[Path]:
    """The files of a pattern, sorted."""
    paths: list[Path] = []
    for pattern in _alternatives(source):
        literal = Path(pattern)
        matched = [literal] if literal.is_file() else [Path(p) for p in glob.glob(pattern)]
        if not matched:
            raise DataError(f"no tar file at {pattern!r}")
        paths += matched
    return sorted(set(paths))


def _alternatives(pattern: str) -> Sequence[str]:
    """`a{00..02}`, `a{x,y}` as the strings that they stand for."""
    pieces: list[list[str]] = []
    for k, piece in enumerate(BRACES.split(pattern)):
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", piece)
        if k % 2 == 0:
            pieces.append([piece])
        elif ends:
            width = len(ends[1]) if ends[1].startswith("0") else 0
            numbers = range(int(ends[1]), int(ends[2]) + 1)
            pieces.append([f"{number:0{width}d}" for number in numbers])
        else:
            pieces.append(piece.split(","))
    return ["".join(parts) for parts in itertools.product(*pieces)]
