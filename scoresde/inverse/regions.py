"""Masks by name, for pictures, signals and volumes: what is known is the same in all channels.

Axes of an item after the first, its channels, are spatial; a vector is one spatial axis.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..noise import KeyedNoise
from ..random_masks import to_lines
from .mask import Mask
from .shapes import item_shape, spatial, spatial_axes


@dataclass(frozen=True, eq=False)
class Region(Mask):
    """Base of masks that are made for a shape: a subclass says which places are known.

    Args:
        shape: of an item.

    Raises:
        ValueError: for numbers out of range, or where nothing would be known.
    """

    mask: Tensor = field(init=False, repr=False)
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        shape = item_shape(self.shape, "a mask")
        object.__setattr__(self, "shape", shape)
        known = self.places(spatial(shape))
        channels = (1,) * (len(shape) - known.ndim)
        object.__setattr__(self, "mask", known.reshape(*channels, *known.shape))
        super().__post_init__()

    @abstractmethod
    def places(self, space: tuple[int, ...]) -> Tensor:
        """``(*space)`` booleans: the known places."""

    def _share(self, value: float, name: str) -> float:
        if not 0 < value < 1:
            raise ValueError(f"{name} of a mask is in (0, 1), got {value}")
        return value


def _middle(space: tuple[int, ...], side: float) -> Tensor:
    """The box of ``side`` times each size in the middle, at least one entry."""
    box = torch.zeros(space, dtype=torch.bool)
    lengths = [max(1, round(side * n)) for n in space]
    starts = [(n - k) // 2 for n, k in zip(space, lengths, strict=True)]
    box[tuple(slice(s, s + k) for s, k in zip(starts, lengths, strict=True))] = True
    return box


@dataclass(frozen=True, eq=False)
class MiddleBox(Region):
    """All but a box in the middle is known: inpainting.

    Args:
        side: of the box, a share of each size.
    """

    side: float = 0.5

    def places(self, space: tuple[int, ...]) -> Tensor:
        """Outside of the box."""
        return ~_middle(space, self._share(self.side, "side"))


@dataclass(frozen=True, eq=False)
class Outpaint(Region):
    """Only a box in the middle is known: the border is painted.

    Args:
        side: of the box, a share of each size.
    """

    side: float = 0.5

    def places(self, space: tuple[int, ...]) -> Tensor:
        """Inside of the box."""
        return _middle(space, self._share(self.side, "side"))


@dataclass(frozen=True, eq=False)
class Half(Region):
    """One half is known.

    Args:
        side: the known one: ``left``, ``right`` (along the last axis), ``top``, ``bottom`` (the
            one before), ``front``, ``back`` (the third from the last).
    """

    side: Literal["left", "right", "top", "bottom", "front", "back"] = "left"

    def places(self, space: tuple[int, ...]) -> Tensor:
        """The lower half of the indices of an axis, or the upper one."""
        sides = ("left", "right", "top", "bottom", "front", "back")[: 2 * len(space)]
        if self.side not in sides:
            raise ValueError(
                f"the known half of items of shape {self.shape} is one of {', '.join(sides)}, "
                f"got {self.side!r}"
            )
        before, late = divmod(sides.index(self.side), 2)
        n = space[-1 - before]
        half = (torch.arange(n) < n // 2) ^ bool(late)
        return half.reshape(-1, *(1,) * before).expand(space)


@dataclass(frozen=True, eq=False)
class RandomPixels(Region):
    """Places drawn at random are known.

    Args:
        share: of the places that are known.
        seed: of the draw.
    """

    share: float = 0.5
    seed: int = 0

    def places(self, space: tuple[int, ...]) -> Tensor:
        """As many of the places as the share says."""
        size = math.prod(space)
        wanted = max(1, round(self._share(self.share, "share") * size))
        order = KeyedNoise(self.seed).uniform((1, size), dtype=torch.float64)[0].argsort()
        known = torch.zeros(size, dtype=torch.bool)
        known[order[:wanted]] = True
        return known.reshape(space)


@dataclass(frozen=True, eq=False)
class Stripes(Region):
    """Stripes across an axis, known and unknown in turn.

    Args:
        period: of the stripes in entries, >= 2.
        width: of the unknown part of each, >= 1 and < period.
        axis: of an item, across which they alternate; a spatial one.
    """

    period: int = 8
    width: int = 4
    axis: int = -1

    def places(self, space: tuple[int, ...]) -> Tensor:
        """The first ``period - width`` entries of each period."""
        axes, count = spatial_axes(self.shape), len(self.shape)
        axis = self.axis % count if -count <= self.axis < count else -1
        if axis not in axes:
            raise ValueError(
                f"the axis of stripes is a spatial one of an item of shape {self.shape}, "
                f"got {self.axis}"
            )
        if not 1 <= self.width < self.period:
            raise ValueError(
                f"stripes are of a width in [1, period), got {self.width} of {self.period}"
            )
        known = torch.arange(self.shape[axis]) % self.period < self.period - self.width
        return known.reshape(-1, *(1,) * (count - axis - 1)).expand(space)


@dataclass(frozen=True, eq=False)
class Strokes(Region):
    """All but a few strokes of a brush is known: free-form inpainting.

    A stroke is a walk of some straight parts, each turned a little from the last, of a round
    brush; in one dimension, a few gaps.

    Args:
        strokes: their number, >= 1.
        thickness: of the brush, a share of the smallest size.
        length: of each straight part, a share of the smallest size.
        parts: straight parts of a stroke, >= 1.
        seed: of the walks.
    """

    strokes: int = 4
    thickness: float = 0.1
    length: float = 0.25
    parts: int = 4
    seed: int = 0

    def places(self, space: tuple[int, ...]) -> Tensor:
        """What no stroke touches."""
        if self.strokes < 1 or self.parts < 1 or not (self.thickness > 0 and self.length > 0):
            raise ValueError(
                "strokes and their parts are >= 1, thickness and length > 0, got "
                f"{self.strokes}, {self.parts}, {self.thickness}, {self.length}"
            )
        sizes, least = torch.tensor(space).double(), min(space)
        axes = [torch.arange(n).double() for n in space]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(space))
        radius = max(self.thickness * least / 2, math.sqrt(len(space)) / 2)
        noise = KeyedNoise(self.seed)
        batch = (self.strokes, len(space))
        place = noise.uniform(batch, dtype=torch.float64) * (sizes - 1)
        direction = noise.normal(batch, dtype=torch.float64)
        corners = [place]
        for _ in range(self.parts):
            direction = direction / direction.norm(dim=1, keepdim=True)
            place = (place + self.length * least * direction).clamp_min(0).minimum(sizes - 1)
            corners.append(place)
            direction = direction + 0.5 * noise.normal(batch, dtype=torch.float64)
        return (to_lines(grid, torch.stack(corners, 1)) > radius).all(0).reshape(space)


@dataclass(frozen=True, eq=False)
class Picture(Region):
    """A black and white picture of what is known, of the proportions of the item.

    It is resized to the item by nearest pixels.

    Args:
        file: of the picture; its pixels are white from half of full brightness on.
        white: whether white is ``known`` or ``unknown``.
        crop: whether a picture of other proportions is cropped about its centre.

    Raises:
        ValueError: for a file that cannot be read, other proportions, or items that are no
            pictures.
    """

    file: Path = Path("mask.png")
    white: Literal["known", "unknown"] = "known"
    crop: bool = False

    def places(self, space: tuple[int, ...]) -> Tensor:
        """The white pixels, or the black ones."""
        from PIL import Image, ImageOps

        if len(space) != 2:
            raise ValueError(f"a mask from a picture is for pictures (C, H, W), not {self.shape}")
        if self.white not in ("known", "unknown"):
            raise ValueError(f"white is known or unknown in a mask, got {self.white!r}")
        try:
            with Image.open(self.file) as opened:
                grey = opened.convert("L")
        except OSError as error:
            raise ValueError(f"cannot read the mask {self.file}: {error}") from error
        height, width = space
        if not self.crop and abs(grey.width * height - grey.height * width) >= max(space):
            raise ValueError(
                f"cannot read the mask {self.file}: it is {grey.width} x {grey.height}, and items "
                f"are {width} x {height}: other proportions"
            )
        grey = ImageOps.fit(grey, (width, height), Image.Resampling.NEAREST)
        pixels = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).reshape(space)
        return (pixels >= 128) ^ (self.white == "unknown")
