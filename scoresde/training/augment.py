r"""Augmentation of training data, between the scaler and the objective.

A network that is told how an item was changed learns the distribution of changed items *given the
change*: at labels of zero it draws unchanged ones, so that nothing leaks into the samples. EDM's
changes are geometric, one affine map of the plane an image; see :mod:`scoresde.training.warp` for
how it is applied.

Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
appendix F.2 and table 6, https://arxiv.org/abs/2206.00364.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import ConfigError, class_name
from ..noise import KeyedNoise
from .warp import SMALLEST, warp


class Augmentation(ABC):
    """A random change of items in model range, ``(B, *shape)``, and the labels that tell of it."""

    labels: ClassVar[int] = 0
    """Numbers a label ``augment`` has; 0 where the network is told nothing."""

    @abstractmethod
    def __call__(self, x: Tensor, noise: KeyedNoise) -> tuple[Tensor, dict[str, Tensor]]:
        """The changed items, and the condition that tells the network of the change.

        Args:
            x: items in model range, ``(B, *shape)``.
            noise: where all random numbers come from, those of an item its own.
        """

    @abstractmethod
    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether items of this shape can be changed so."""


@dataclass(frozen=True)
class Flip(Augmentation):
    """A mirror image, with probability 1/2: the last axis of an image or signal is reversed.

    The network is not told: samples are mirrored as often as not, as the mirrored data are.
    """

    def __call__(self, x: Tensor, noise: KeyedNoise) -> tuple[Tensor, dict[str, Tensor]]:
        """``x (B, C, *spatial)``, half of it mirrored, and no condition."""
        turned = noise.uniform((len(x), 1), x.device) < 0.5
        return _where(turned[:, 0], x.flip(-1), x), {}

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Items with a spatial axis."""
        return len(shape) > 1


@dataclass(frozen=True)
class EDM(Augmentation):
    r"""EDM's geometric changes of images ``(C, H, W)``, with nine labels.

    In this order, in pixels from the centre of the image, the second axis downwards:

        x-flip       diag(1 - 2 a0, 1)                 a0 in {0, 1}       a0
        y-flip       diag(1, 1 - 2 a1)                 a1 in {0, 1}       a1
        scale        s^a2                              a2 ~ N(0, 1)       a2
        rotation     R(-a3)                            a3 ~ U(-pi, pi)    cos a3 - 1, sin a3
        anisotropy   R(a4) diag(s^a5, s^-a5) R(-a4)    a4 ~ U(-pi, pi)    a5 cos a4
                                                       a5 ~ N(0, 1)       a5 sin a4
        translation  + r (W a6, H a7)                  a6, a7 ~ N(0, 1)   a6, a7

    where the last column is the label. The x-flip is always drawn, each of the others with
    probability ``p``; what is not drawn is left out, with labels of zero. The labels of an
    anisotropy leave open whether its axis is stretched or squeezed, as in the paper.

    Flips are permutations of the pixels, and an image without any other change is returned as it
    is. Otherwise values may leave the range of the data by a little, as band-limited
    interpolation overshoots at edges.

    Args:
        p: probability of each change but the x-flip, in [0, 1].
        x_flip: whether images are mirrored.
        y_flip: whether images are turned upside down.
        scale: factor of one standard deviation, >= 1; 1 for none.
        rotation: largest angle as a share of pi, in [0, 1]; 0 for none.
        anisotropy: factor of one standard deviation, >= 1; 1 for none.
        translation: standard deviation as a share of the image's sides, >= 0; 0 for none.
    """

    p: float = 0.12
    x_flip: bool = True
    y_flip: bool = True
    scale: float = 2**0.2
    rotation: float = 1.0
    anisotropy: float = 2**0.2
    translation: float = 0.125

    labels: ClassVar[int] = 9

    def __post_init__(self) -> None:
        for key in ("p", "rotation"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} must be in [0, 1], got {getattr(self, key)}")
        for key in ("scale", "anisotropy"):
            if not 1 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        if not 0 <= self.translation < math.inf:
            raise ValueError(f"translation must be at least 0, got {self.translation}")

    def __call__(self, x: Tensor, noise: KeyedNoise) -> tuple[Tensor, dict[str, Tensor]]:
        """``x (B, C, H, W)``, changed, and ``{"augment": (B, 9)}``."""
        height, width = x.shape[-2:]
        a = self.draw(len(x), noise, x.device).to(x.dtype)
        a0, a1, a2, a3, a4, a5, a6, a7 = a.unbind(1)
        x = _where(a0 > 0, x.flip(-1), x)
        x = _where(a1 > 0, x.flip(-2), x)
        stretch = _diagonal(self.anisotropy**a5, self.anisotropy**-a5)
        linear = _product(_rotation(a4), stretch, _rotation(-a4), _rotation(-a3))
        linear = linear * (self.scale**a2).reshape(-1, 1, 1)
        shift = self.translation * torch.stack([width * a6, height * a7], 1)
        moved = (a[:, 2:] != 0).any(1)
        x = _where(moved, warp(x, linear, shift), x)
        labels = [a0, a1, a2, a3.cos() - 1, a3.sin(), a5 * a4.cos(), a5 * a4.sin(), a6, a7]
        return x, {"augment": torch.stack(labels, 1)}

    def draw(self, batch: int, noise: KeyedNoise, device: torch.device) -> Tensor:
        """``a0..a7``, ``(batch, 8)``, each zero where its change is left out.

        The same numbers are drawn whichever changes there are, so that leaving out one changes
        nothing in the others.
        """
        u = noise.uniform((batch, 9), device)
        n = noise.normal((batch, 4), device)
        angles = math.pi * (2 * u[:, 2:4] - 1)
        drawn = [
            *(u[:, :2] < 0.5).to(u.dtype).unbind(1),
            n[:, 0], self.rotation * angles[:, 0], angles[:, 1], n[:, 1], n[:, 2], n[:, 3],
        ]  # fmt: skip
        y_flip, scale, rotation, anisotropy, translation = (u[:, 4:] < self.p).unbind(1)
        on = torch.ones_like(y_flip)
        kept = [
            on & self.x_flip,
            y_flip & self.y_flip,
            scale & (self.scale != 1),
            rotation & (self.rotation != 0),
            *[anisotropy & (self.anisotropy != 1)] * 2,
            *[translation & (self.translation != 0)] * 2,
        ]
        return torch.stack(drawn, 1) * torch.stack(kept, 1)

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Images, of two pixels or more each way."""
        return len(shape) == 3 and min(shape[1:]) >= SMALLEST


def check(augment: Augmentation | None, net: Any, shape: tuple[int, ...]) -> None:
    """Refuses an augmentation that does not fit the data, or whose labels the network cannot take.

    Args:
        augment: the augmentation, None for none.
        net: the network, whose field ``augment`` is the number of its augmentation labels.
        shape: shape of one item.

    Raises:
        ConfigError: naming what does not fit and what is accepted.
    """
    if augment is not None and not augment.takes(tuple(shape)):
        name = class_name(type(augment))
        kinds = "images (C, H, W)" if augment.labels else "images and signals (C, *spatial)"
        raise ConfigError(f"data.augment {name!r} takes {kinds}, not items of shape {shape}")
    given = 0 if augment is None else augment.labels
    taken = getattr(net, "augment", 0)
    if given == taken:
        return
    if augment is None or not given:
        raise ConfigError(
            f"net.augment is {taken}, but data.augment gives the network no labels; "
            f"leave net.augment out, or say data.augment: edm"
        )
    raise ConfigError(
        f"data.augment {class_name(type(augment))!r} tells the network {given} labels, but "
        f"net.augment is {taken}; set net.augment={given}, which ncsnpp and adm have"
    )


def _where(turned: Tensor, changed: Tensor, x: Tensor) -> Tensor:
    """Items of ``changed`` where ``turned (B,)``, of ``x`` elsewhere."""
    return torch.where(turned.reshape(-1, *(1,) * (x.ndim - 1)), changed, x)


def _rotation(angle: Tensor) -> Tensor:
    """``R(angle)``, ``(B,)`` to ``(B, 2, 2)``."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], -1).reshape(-1, 2, 2)


def _diagonal(first: Tensor, second: Tensor) -> Tensor:
    """``diag(first, second)``, ``(B,)`` to ``(B, 2, 2)``."""
    return torch.diag_embed(torch.stack([first, second], -1))


def _product(*matrices: Tensor) -> Tensor:
    """The product of matrices ``(B, 2, 2)``, in full precision whatever a device does to ``@``."""
    return reduce(lambda a, b: (a[:, :, :, None] * b[:, None, :, :]).sum(2), matrices)


__all__ = ["EDM", "Flip"]
