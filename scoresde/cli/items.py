"""Single items on the command line: image files, arrays, and held-out items by their index."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from ..model import ScoreModel

ACCEPTED = (
    "an image file (.png, .jpg, .webp, .bmp, .gif), a .npy of one item in data units (FILE.npy:3 "
    "for the fourth of several), "
    "or the index of an item that the run held out"
)


class Item(NamedTuple):
    """An item in data units, ``(1, *shape)``, its label where known, and what it is called."""

    x: Tensor
    label: int | None
    name: str


def read_item(model: ScoreModel, run: str, text: str, resize: bool = False) -> Item:
    """The item that ``text`` names, checked to fit the model; pictures cropped to it if wanted.

    Raises:
        ValueError: nothing there, a file that cannot be read, or another shape.
    """
    file, _, index = text.rpartition(":")
    if index.isdecimal() and file.lower().endswith(".npy"):
        return Item(_array(model, Path(file), int(index)), None, text)
    path = Path(text)
    if path.is_file():
        if is_picture(path):
            return Item(read_picture(model, path, resize=resize), None, text)
        if path.suffix.lower() == ".npy":
            return Item(_array(model, path, None), None, text)
    if text.isdecimal():
        return _held_out(model, run, int(text))
    what = "cannot read this kind of file" if path.exists() else "there is no such file"
    raise ValueError(f"no item at {text!r}: {what}; accepted: {ACCEPTED}")


def is_picture(path: Path) -> bool:
    """Whether a file is a picture, by its suffix."""
    from ..data.pictures import PICTURES

    return path.suffix.lower() in PICTURES


def read_picture(
    model: ScoreModel, path: Path, shape: tuple[int, ...] | None = None, resize: bool = False
) -> Tensor:
    """A picture in the data units of the model, ``(1, *shape)``: the inverse of its pictures.

    Args:
        model: whose units are wanted.
        path: the file.
        shape: of the picture, that of the model's items if None.
        resize: whether a picture of another size is cropped about its centre to the proportions
            of the shape, and resized.

    Raises:
        ValueError: a model of no pictures, an unreadable file, or another size.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    from ..data.pictures import decode

    wanted = "the model takes items" if shape is None else "what was measured is"
    shape = _shape(model) if shape is None else shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"{path} is a picture, and the model takes items of shape {shape}")
    array = decode(str(path), path.read_bytes)
    if resize:
        fitted = ImageOps.fit(
            Image.fromarray(array), (shape[2], shape[1]), Image.Resampling.LANCZOS
        )
        array = np.asarray(fitted)
    decoded = torch.from_numpy(array.copy()).float()
    pixels = decoded[None, None] if decoded.ndim == 2 else decoded.permute(2, 0, 1)[None]
    if shape[0] == 1 and pixels.shape[1] == 3:
        luma = torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)
        pixels = (pixels * luma).sum(1, keepdim=True).round()
    pixels = pixels.expand(-1, shape[0], -1, -1)
    _check(tuple(pixels.shape[1:]), shape, str(path), wanted)
    scaler = model.scaler
    if scaler is None:
        return pixels / 127.5 - 1
    if scaler.levels is None:
        return scaler.decode(pixels / 127.5 - 1)
    return (pixels * (scaler.levels - 1) / 255).round().long()


def encode_items(model: ScoreModel, x: Tensor, seed: int, start: int, dequantize: bool) -> Tensor:
    """Items in data units in model range, float32, ``(B, *shape)``.

    Discrete data is dequantised by noise of ``seed`` and of the item's index, like the data that
    the model has seen, or put in the middle of its levels.
    """
    import torch

    from ..noise import KeyedNoise

    scaler = model.scaler
    if scaler is None:
        return x.float()
    noise = None
    if scaler.levels is not None and dequantize:
        source = KeyedNoise(seed ^ _DEQUANTISATION, start)
        noise = source.uniform(tuple(x.shape), x.device, torch.float32)
    return scaler.encode(x, noise=noise, dequantize=dequantize).float()


_DEQUANTISATION = 1 << 41  # keeps its noise apart from that of the prior of the same seed


def _array(model: ScoreModel, path: Path, index: int | None) -> Tensor:
    """An item of a .npy file, whole levels where the model's data are discrete."""
    import numpy as np
    import torch

    from ..data import Dataset

    shape = _shape(model)
    try:
        values = np.load(path, allow_pickle=False)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:  # NumPy takes any other file for a pickle
        raise ValueError(f"{path} cannot be read: it holds no array of NumPy") from error
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{path} holds {values.dtype}; an item is made of numbers")
    x = torch.from_numpy(np.ascontiguousarray(values))
    if index is not None:
        if x.ndim < 1 or index >= len(x):
            raise ValueError(f"{path} holds {len(x) if x.ndim else 1} items, and none of {index}")
        x = x[index]
    elif tuple(x.shape[1:]) == shape and len(x) != 1:
        raise ValueError(f"{path} holds {len(x)} items: take one of them, as in {path}:0")
    elif tuple(x.shape[1:]) == shape:
        x = x[0]
    _check(tuple(x.shape), shape, str(path))
    levels = None if model.scaler is None else model.scaler.levels
    if levels is None:
        return Dataset(x[None].float(), name=str(path)).x
    whole = x.long()
    if x.is_floating_point() and not bool((whole == x).all()):
        raise ValueError(f"{path} must hold whole levels 0 to {levels - 1}, as the model's data")
    return Dataset(whole[None], levels=levels, name=str(path)).x


def _held_out(model: ScoreModel, run: str, index: int) -> Item:
    from .heldout import held_out_data

    try:
        data = held_out_data(run, None, "test")
    except ValueError as error:
        what = str(error).removesuffix(": name them with --data")
        raise ValueError(f"no held-out item {index}: {what}; give a file as the item") from error
    if index >= len(data):
        raise ValueError(
            f"no held-out item {index}: {run} held out items 0 to {len(data) - 1} of {data.name}"
        )
    _check(tuple(data.shape), _shape(model), data.name)
    label = None if data.y is None else int(data.y[index])
    return Item(data.x[index : index + 1], label, f"{data.name}:{index}")


def _shape(model: ScoreModel) -> tuple[int, ...]:
    if model.shape is None:
        raise ValueError("the model does not say the shape of its items")
    return tuple(model.shape)


def _check(
    found: tuple[int, ...], wanted: tuple[int, ...], name: str, by: str = "the model takes items"
) -> None:
    if found != wanted:
        raise ValueError(f"{name} is of shape {found}, and {by} of {wanted}")
