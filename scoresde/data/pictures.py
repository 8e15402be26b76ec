"""Read pictures, whatever their modes, as uint8: one by one, from a folder or a .zip.

All are grey if every one is, else RGB; sizes must agree, or `size` crops the centre square and
resizes it. Folders directly under the root are the classes if every picture lies in one. A root
that holds only `train/`, `test/`, `validation/` has those splits, with the classes inside them.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from scoresde.data.dataset import DataError, spread
from scoresde.data.items import ColourError, Items, Reader, Terms
from scoresde.data.source import UnreadableError
from scoresde.data.tree import Tree, splits_of, wrapped

Picture = tuple[str, Callable[[], bytes]]  # a name, and what reads the bytes
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
SURVEYED = 50  # pictures, spread over the set, that tell its size and whether it has colours


def decode(name: str, read: Callable[[], bytes], size: int | None = None) -> np.ndarray:
    """One picture as `(H, W)` if it is grey, else `(H, W, 3)`, uint8; of an animation, the first.

    Args:
        name: of the picture, for messages.
        read: gives the encoded bytes.
        size: crop the centre square and resize it to `size x size`.

    Raises:
        UnreadableError: bytes that are missing, cut short, damaged or no picture.
        DataError: more than 8 bits a channel.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(read())) as opened:
            if opened.mode.startswith(("I", "F")):
                raise DataError(
                    f"{name}: has more than 8 bits a channel (mode {opened.mode}); "
                    "convert it, or save the set as .npy"
                )
            grey = opened.mode in ("1", "L", "LA")
            image = ImageOps.exif_transpose(opened).convert("L" if grey else "RGB")
            if size is not None:
                image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
            return np.asarray(image)
    except DataError:
        raise
    except UnidentifiedImageError as error:  # its text names a buffer, not the file
        raise UnreadableError(f"{name}: cannot be read as a picture: no known format") from error
    except Exception as error:  # codecs raise whatever they like
        raise UnreadableError.caused(f"{name}: cannot be read as a picture", error) from error


@dataclass(frozen=True)
class Frame:
    """What all pictures of a set share: `shape`, `(C, H, W)`, as the picture `first` has it."""

    shape: tuple[int, ...]
    first: str
    size: int | None = None

    @classmethod
    def of(cls, pictures: Sequence[Picture], size: int | None) -> Frame:
        """What `pictures` show of their set; those that cannot be read are passed over.

        Raises:
            DataError: two sizes, where `size` is not given, or none can be read.
        """
        frame: Frame | None = None
        for k, picture in enumerate(pictures):
            try:
                array = decode(*picture, size)
            except UnreadableError:
                if frame is None and k == len(pictures) - 1:
                    raise
                continue
            frame = frame or cls((1, *array.shape[:2]), picture[0], size)
            frame.check(picture[0], array)
            frame = replace(
                frame, shape=(max(array.ndim * 2 - 3, frame.shape[0]), *frame.shape[1:])
            )
        if frame is None:
            raise DataError("there are no pictures")
        return frame

    def check(self, name: str, array: np.ndarray) -> None:
        """Whether a decoded picture is as large as the first.

        Raises:
            DataError: it is not.
        """
        height, width = self.shape[1:]
        if array.shape[:2] != (height, width):
            raise DataError(
                f"{self.first} is {width}x{height} but {name} is "
                f"{array.shape[1]}x{array.shape[0]}; set data.size to crop and resize"
            )

    def stack(self, pictures: Sequence[Picture]) -> Tensor:
        """Pictures, decoded, `(b, C, H, W)`, uint8.

        Raises:
            UnreadableError: one cannot be read.
            DataError: one is of another size, or has colours where the set is grey.
        """
        x = np.empty((len(pictures), *self.shape), np.uint8)
        for row, (name, read) in zip(x, pictures, strict=True):
            array = decode(name, read, self.size)
            self.check(name, array)
            if array.ndim == 3 and self.shape[0] == 1:
                raise ColourError(
                    f"{name} has colours, but {self.first} and others of the set are grey; "
                    "save all of them in one mode"
                )
            row[...] = array if array.ndim == 2 else array.transpose(2, 0, 1)
        return torch.from_numpy(x)


@dataclass(frozen=True)
class Folder:
    """Pictures in a folder, by their paths below `root`."""

    root: Path
    names: Sequence[str]

    def read(self, name: str) -> bytes:
        """The bytes of the picture of this name."""
        return (self.root / name).read_bytes()


@dataclass(frozen=True)
class Zip:
    """Pictures in a .zip, by their names without the folder that wraps them all."""

    path: Path
    names: Sequence[str]
    wrap: str = ""

    def read(self, name: str) -> bytes:
        """The bytes of the picture of this name."""
        return _archive(self.path, os.getpid()).read(self.wrap + name)


@lru_cache(maxsize=4)
def _archive(path: Path, process: int) -> zipfile.ZipFile:
    """An archive as a process has it open: forked ones would share one place in the file."""
    return zipfile.ZipFile(path)


@dataclass(frozen=True, eq=False)
class PictureItems(Items):
    """Pictures of one size, with the classes of their folders."""

    name: str
    files: Folder | Zip
    frame: Frame
    y: Tensor | None
    class_names: tuple[str, ...] | None
    levels: int | None = 256
    vectors: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """`(C, H, W)`."""
        return self.frame.shape

    def __len__(self) -> int:
        return len(self.files.names)

    def where(self, i: int) -> str:
        """The name of a picture's file."""
        return self.files.names[i]

    def read(self, index: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Pictures `(b, C, H, W)`, uint8, and their classes."""
        names = [self.files.names[i] for i in index]
        x = self.frame.stack([(name, partial(self.files.read, name)) for name in names])
        return x, None if self.y is None else self.y[torch.as_tensor(index)]

    def in_colour(self) -> PictureItems:
        """The same pictures with three channels."""
        return replace(self, frame=replace(self.frame, shape=(3, *self.shape[1:])))


def open_pictures(root: Path) -> dict[str, Reader]:
    """The splits of a folder or .zip of pictures and what reads each.

    Returns:
        nothing where a folder holds no picture.

    Raises:
        DataError: no picture in a .zip, or a damaged archive.
    """
    files = _list_zip(root) if root.is_file() else _list_folder(root)
    trees = splits_of(root.name, files.names)
    return {
        split: partial(_read_pictures, root.name, files, tree) for split, tree in trees.items()
    }


def _list_folder(root: Path) -> Folder:
    found = (path.relative_to(root).as_posix() for path in root.rglob("*"))
    return Folder(root, sorted(filter(_is_picture, found)))


def _list_zip(root: Path) -> Zip:
    try:
        with zipfile.ZipFile(root) as archive:
            names = sorted(filter(_is_picture, archive.namelist()))
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError.caused(root.name, error) from error
    if not names:
        raise DataError(f"{root.name}: holds no pictures ({', '.join(PICTURES)})")
    wrap = wrapped(names)
    return Zip(root, [name[len(wrap) :] for name in names], wrap)


def _is_picture(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in PICTURES and not hidden


def _read_pictures(root: str, files: Folder | Zip, tree: Tree, terms: Terms) -> PictureItems:
    names, count = tree.names, len(tree.names)
    if terms.limit is not None and terms.limit < count:  # spread, as they lie class by class
        names = [names[i] for i in spread(count, terms.limit).tolist()]
    here = replace(files, names=names)
    surveyed = [names[i] for i in spread(len(names), SURVEYED).tolist()]
    frame = Frame.of([(name, partial(files.read, name)) for name in surveyed], terms.size)
    y = tree.labels(names)
    return PictureItems(root, here, frame, y, tree.classes if y is not None else None)
