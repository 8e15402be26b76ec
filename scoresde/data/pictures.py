"""Read pictures from a folder or a .zip, whatever their modes, into one uint8 tensor.

All are grey if every one is, else RGB; sizes must agree, or `size` crops the centre square and
resizes it. Folders directly under the root are the classes if every picture lies in one. A root
that holds only `train/`, `test/`, `validation/` has those splits, with the classes inside them.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from scoresde.data.dataset import SPLITS, DataError, Dataset, Reader

Picture = tuple[str, Callable[[], bytes]]  # a name, and what reads the bytes
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


def open_pictures(root: Path) -> dict[str, Reader]:
    """The splits of a folder or .zip of pictures and what reads each.

    Raises:
        DataError: no picture in it, or a damaged archive.
    """
    pictures = _list_zip(root) if root.is_file() else _list_folder(root)
    if not pictures:
        raise DataError(
            f"{root.name}: holds no pictures ({', '.join(PICTURES)})"
            f"{'' if root.is_file() else ', no parquet and no IDX files'}"
        )
    splits = {PurePosixPath(name).parts[0] for name, _ in pictures}
    if "train" in splits and len(splits & set(SPLITS)) > 1 and not splits <= set(SPLITS):
        raise DataError(
            f"{root.name}: {min(splits - set(SPLITS))} lies beside the splits "
            f"{', '.join(sorted(splits & set(SPLITS)))}; move it out or into one"
        )
    if not splits <= set(SPLITS):
        return {"train": partial(_read_pictures, root.name, pictures, pictures, 0)}
    return {
        split: partial(
            _read_pictures,
            root.name,
            pictures,
            [p for p in pictures if p[0].startswith(split + "/")],
            1,
        )
        for split in SPLITS
        if split in splits
    }


def _list_folder(root: Path) -> list[Picture]:
    names = {path.relative_to(root).as_posix(): path for path in root.rglob("*")}
    return [(name, names[name].read_bytes) for name in sorted(names) if _is_picture(name)]


def _list_zip(root: Path) -> list[Picture]:
    try:
        archive = zipfile.ZipFile(root)  # stays open for its pictures
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError.caused(root.name, error) from error
    names = sorted(filter(_is_picture, archive.namelist()))
    tops = {name.split("/")[0] for name in names}
    strip = 0  # a zip often wraps one folder
    if len(tops) == 1 and not tops & set(SPLITS) and all("/" in name for name in names):
        strip = len(tops.pop()) + 1
    return [(name[strip:], partial(archive.read, name)) for name in names]


def _is_picture(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in PICTURES and not hidden


def _read_pictures(
    root: str,
    every: list[Picture],
    pictures: list[Picture],
    depth: int,
    size: int | None,
    limit: int | None,
) -> Dataset:
    """Those of `every` picture that are `pictures`; their parts at `depth` may be classes."""
    parts = [PurePosixPath(name).parts for name, _ in every]
    labelled = all(len(p) > depth + 1 for p in parts)  # the same classes in every split
    if limit is not None and limit < len(pictures):  # spread, as they lie class by class
        pictures = [pictures[i * len(pictures) // limit] for i in range(limit)]
    x = decode_all(pictures, size)
    if not labelled:
        return Dataset(x, levels=256, name=root)
    classes = sorted({p[depth] for p in parts})
    index = {name: k for k, name in enumerate(classes)}
    y = [index[PurePosixPath(name).parts[depth]] for name, _ in pictures]
    return Dataset(x, torch.tensor(y), 256, root, tuple(classes))


def decode_all(pictures: Sequence[Picture], size: int | None) -> Tensor:
    """Pictures as `(N, C, H, W)`, uint8, with one channel if all are grey, else three.

    Raises:
        DataError: a picture that cannot be read, or, without `size`, two different sizes.
    """
    arrays = [_decode(picture, size) for picture in pictures]  # threads gain nothing measurable
    height, width = arrays[0].shape[:2]
    for (name, _), array in zip(pictures, arrays, strict=True):
        if array.shape[:2] != (height, width):
            raise DataError(
                f"{pictures[0][0]} is {width}x{height} but {name} is "
                f"{array.shape[1]}x{array.shape[0]}; set data.size to crop and resize"
            )
    channels = max(array.ndim for array in arrays) * 2 - 3  # (H, W) or (H, W, 3)
    x = np.empty((len(arrays), channels, height, width), np.uint8)
    for i, array in enumerate(arrays):
        x[i] = array if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(x)


def _decode(picture: Picture, size: int | None) -> np.ndarray:
    """One picture as `(H, W)` if it is grey, else `(H, W, 3)`; of an animation, the first."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    name, read = picture
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
        raise DataError(f"{name}: cannot be read as a picture: no known format") from error
    except Exception as error:  # codecs raise whatever they like
        raise DataError.caused(f"{name}: cannot be read as a picture", error) from error
