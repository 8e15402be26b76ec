r"""What a network is given of each item beside its noisy state: an image, joined to its input.

A network trained so estimates ``grad log p_t(x | image)``: the posterior of an inverse problem is
learned, and sampling needs no approximation of it. Each kind turns items into images while
training, and a measurement into the image of the same form afterwards:

    masked:    [mask x_0, mask]            inpainting and outpainting
    degraded:  [A^+ (A x_0 + noise), 1]    super-resolution, colourisation, any linear operator

A share of the items is trained without any (zeros, in the last channel too), so that the network
is an unconditional model as well: it is what it then is asked for without an ``image``.

Sources: GLIDE: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion
Models (Nichol et al., 2022), section 3.1, https://arxiv.org/abs/2112.10741; Palette:
Image-to-Image Diffusion Models (Saharia et al., 2022), https://arxiv.org/abs/2111.05826.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .config import ConfigError, unknown
from .noise import KeyedNoise, NoiseSource, normal, uniform
from .random_masks import KINDS, random_masks


@dataclass(frozen=True)
class Masked:
    """Some entries of the item, and which: ``[mask x_0, mask]``, one mask for all channels.

    A vector has no channels: its mask is as long as it is.

    Args:
        kinds: of masks, drawn with equal chances: ``boxes`` hide up to three boxes, ``outside``
            hides all but one, ``strokes`` hide a broad line, ``pixels`` hide single entries.
        empty: share of the items of which nothing is known, in [0, 1].
    """

    kinds: tuple[str, ...] = KINDS
    empty: float = 0.1

    def __post_init__(self) -> None:
        kinds = (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds)
        object.__setattr__(self, "kinds", kinds)
        for kind in self.kinds:
            if kind not in KINDS:
                raise unknown("kind of mask", kind, KINDS)
        if not self.kinds:
            raise ConfigError(f"given.kinds is empty; accepted: {', '.join(KINDS)}")
        _check_share(self.empty)

    def channels(self, shape: tuple[int, ...]) -> int:
        """Channels of the image for items of ``shape (C, *spatial)``, or ``(D,)``."""
        return shape[0] + (1 if len(shape) > 1 else shape[0])

    def draw(self, x0: Tensor, source: NoiseSource | None = None) -> Tensor:
        """The images of items ``(B, C, *spatial)`` for training, ``(B, C + 1, *spatial)``."""
        spatial = tuple(x0.shape[2:]) or tuple(x0.shape[1:])
        mask = random_masks(len(x0), spatial, self.kinds, source, x0.device).to(x0.dtype)
        mask = mask.reshape(len(x0), -1, *x0.shape[2:]) * _kept(x0, self.empty, source)
        return torch.cat([mask * x0, mask], 1)

    def image(self, operator: Any, y: Tensor) -> Tensor:
        """The image of a measurement ``y (B, *shape)`` by a :class:`~scoresde.inverse.Mask`.

        Raises:
            ConfigError: for any other operator, or a mask that differs between channels.
        """
        from .inverse.mask import Mask

        if not isinstance(operator, Mask):
            raise ConfigError(
                "this model was trained to fill in what a mask hides; for another operator take "
                "a method that needs no training, such as pgdm"
            )
        if y.ndim > 2 and not bool((operator.mask == operator.mask[:1]).all()):
            raise ConfigError("this model was trained on masks that all channels share")
        known = operator.known(y)
        shared = known[:1] if y.ndim > 2 else known
        return torch.cat([operator.seen(y), shared.expand(len(y), *shared.shape)], 1)


@dataclass(frozen=True)
class Degraded:
    """What a linear operator has left of the item, in its shape: ``[A^+ (A x_0 + noise), 1]``.

    Args:
        operator: section of an operator of :mod:`scoresde.inverse.operators`, such as
            ``{name: average-pool, factor: 4}``.
        noise_std: standard deviation of the measurement's noise in model range, >= 0.
        empty: share of the items of which nothing is known, in [0, 1].
    """

    operator: Any = field(default_factory=lambda: {"name": "average-pool", "factor": 4})
    noise_std: float = 0.0
    empty: float = 0.1

    def __post_init__(self) -> None:
        if not (isinstance(self.operator, (str, Mapping))):
            raise ConfigError(f"given.operator must be a name or a section, got {self.operator!r}")
        if not 0 <= self.noise_std < math.inf:
            raise ConfigError(f"given.noise_std must be finite and >= 0, got {self.noise_std}")
        _check_share(self.empty)

    def channels(self, shape: tuple[int, ...]) -> int:
        """Channels of the image for items of ``shape (C, *spatial)``."""
        return shape[0] + 1

    def of(self, shape: tuple[int, ...]) -> Any:
        """The operator on items of a shape, made once."""
        from .config import build
        from .inverse import operators

        kept, shape = self.__dict__.setdefault("_made", {}), tuple(shape)
        if shape not in kept:
            kept[shape] = build(self.operator, operators, "operator", shape=shape)
        return kept[shape]

    def draw(self, x0: Tensor, source: NoiseSource | None = None) -> Tensor:
        """The images of items ``(B, C, *spatial)`` for training, ``(B, C + 1, *spatial)``."""
        operator = self.of(tuple(x0.shape[1:]))
        y = operator(x0)
        if self.noise_std > 0:
            drawn = normal(tuple(y.shape), source, device=y.device, dtype=y.dtype)
            y = y + self.noise_std * drawn
        image = self.image(operator, y)
        return image * _kept(x0, self.empty, source)

    def image(self, operator: Any, y: Tensor) -> Tensor:
        """The image of a measurement ``y (B, *out)`` by the operator that was trained for.

        Raises:
            ConfigError: for another operator.
        """
        wanted = self.of(operator.shape)
        # Looked at once for an operator: this is asked at every step.
        if operator is not wanted and self.__dict__.get("_same") is not operator:
            if not _same(wanted, operator):
                raise ConfigError(
                    f"this model was trained to undo {wanted!r}, not {operator!r}; for another "
                    "operator take a method that needs no training, such as pgdm"
                )
            self.__dict__["_same"] = operator
        known = operator.pinv(y)
        return torch.cat([known, torch.ones_like(known[:, :1])], 1)


def _check_share(empty: float) -> None:
    if not 0 <= empty <= 1:
        raise ConfigError(f"given.empty must be in [0, 1], got {empty}")


def _same(a: Any, b: Any) -> bool:
    """Whether two operators make the same of random items."""
    if tuple(a.out) != tuple(b.out):
        return False
    (device, dtype), shape = b.home, (2, *a.shape)
    x = KeyedNoise(0).normal(shape, device, dtype)
    with torch.no_grad():
        found, wanted = b(x), a(x)
    return bool((found - wanted).abs().max() <= 1e-3 * wanted.abs().max())


def _kept(x0: Tensor, empty: float, source: NoiseSource | None) -> Tensor:
    """One number an item, 0 where nothing is to be known of it and else 1, ``(B, 1, ...)``."""
    drawn = uniform((len(x0), 1), source, device=x0.device, dtype=x0.dtype)
    return (drawn >= empty).to(x0.dtype).reshape(-1, *(1,) * (x0.ndim - 1))


__all__ = ["Degraded", "Masked"]
