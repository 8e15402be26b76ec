r"""Residual U-Net for signals, images and volumes: one network in one, two or three dimensions.

Levels halve the resolution. Each has residual blocks (group norm, SiLU, convolution, modulated by
the embedding of the noise level), with self-attention at chosen levels; the way up takes the skip
connections of the way down. Any spatial size fits: items are padded to the stride of the network
and cropped back.

Sources: Denoising Diffusion Probabilistic Models (Ho et al., 2020),
https://arxiv.org/abs/2006.11239; scale-shift modulation: Diffusion Models Beat GANs on Image
Synthesis (Dhariwal & Nichol, 2021), https://arxiv.org/abs/2105.05233.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import layers
from .embed import ClassEmbedding, NoiseEmbedding, fourier_features
from .layers import GroupNorm
from .layout import channels_last, cropped, image_for, padded, weights_last

CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with zero weights, so that its residual branch starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def group_norm(channels: int) -> GroupNorm:
    """Group norm with groups of 8 channels or more, 32 groups at most."""
    return layers.group_norm(channels, math.gcd(channels, min(32, max(1, channels // 8))), 1e-6)


class ResBlock(nn.Module):
    """``skip(x) + conv(silu(norm(conv(silu(norm(x)))) (1 + scale) + shift))``."""

    def __init__(self, n: int, inside: int, outside: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(inside)
        self.conv1 = CONV[n](inside, outside, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * outside)
        self.norm2 = group_norm(outside)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(CONV[n](outside, outside, 3, padding=1))
        self.skip = CONV[n](inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``(B, inside, *spatial)`` to ``(B, outside, *spatial)``."""
        h = self.conv1(functional.silu(self.norm1(x)))
        scale, shift = (
            self.modulation(embedding).reshape(len(x), -1, *(1,) * (x.ndim - 2)).chunk(2, 1)
        )
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.skip(x) + self.conv2(self.dropout(functional.silu(h)))


class Attention(nn.Module):
    """Self-attention over all positions, heads of ``head_dim`` channels, residual."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.heads = max(1, channels // head_dim)
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, *spatial)`` to the same shape."""
        batch, channels, *spatial = x.shape
        h = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = functional.scaled_dot_product_attention(q, k, v)
        h = self.out(h.transpose(1, 2).flatten(2))
        return x + h.transpose(1, 2).reshape(batch, channels, *spatial)


class Stage(nn.Module):
    """One residual block, with attention after it where asked for."""

    def __init__(self, block: ResBlock, attention: Attention | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """As :class:`ResBlock`."""
        x = self.block(x, embedding)
        return x if self.attention is None else self.attention(x)


@dataclass(eq=False, repr=False)
class UNet(nn.Module):
    """U-Net ``F(x, c_noise, y)`` for items of shape ``(C, *spatial)``, 1 to 3 spatial axes.

    Args:
        shape: shape of one item, ``(C, *spatial)``.
        width: channels of the first level.
        multipliers: channels of each level, in units of ``width``.
        blocks: residual blocks a level on the way down (one more on the way up).
        attention: levels (0 is the full resolution) with self-attention; it also sits in the
            middle of the network.
        head_dim: channels of an attention head.
        dropout: rate of dropout within the residual blocks.
        fourier: powers n of the input features sin, cos of 2^n pi x, damped by the noise, whose
            level relative to the data is ``exp(4 c_noise)``; () for none.
        num_classes: number of classes of ``y``, None for an unconditional network.
        image_channels: channels of the condition ``image``, joined to the input; 0 for none.
    """

    shape: tuple[int, ...]
    width: int = 64
    multipliers: tuple[int, ...] = (1, 2, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (2,)
    head_dim: int = 32
    dropout: float = 0.0
    fourier: tuple[int, ...] = ()
    num_classes: int | None = None
    image_channels: int = 0

    name: ClassVar[str] = "unet"
    presets: ClassVar[dict[str, dict[str, object]]] = {
        "tiny": {"width": 32, "multipliers": (1, 2), "blocks": 1, "attention": (1,)},
        "small": {"width": 64, "multipliers": (1, 2, 2), "blocks": 2, "attention": (2,)},
        "base": {"width": 128, "multipliers": (1, 2, 2, 2), "blocks": 3, "attention": (1,)},
    }

    def __post_init__(self) -> None:
        super().__init__()
        n = len(self.shape) - 1
        if n not in CONV:
            raise ValueError(
                f"the unet takes items of shape (C, *spatial) with 1 to 3 spatial axes, "
                f"not {tuple(self.shape)}; use the mlp for vectors"
            )
        if not self.multipliers or min(self.multipliers) < 1 or self.width < 1 or self.blocks < 1:
            raise ValueError("the unet needs width, blocks and multipliers of at least 1")
        self.shape, self.multipliers = tuple(self.shape), tuple(self.multipliers)
        self.attention, self.fourier = tuple(self.attention), tuple(self.fourier)
        widths = [self.width * m for m in self.multipliers]
        embedding = 4 * self.width
        conv = CONV[n]
        self.stride = 2 ** (len(widths) - 1)

        def stage(inside: int, outside: int, attend: bool) -> Stage:
            block = ResBlock(n, inside, outside, embedding, self.dropout)
            return Stage(block, Attention(outside, self.head_dim) if attend else None)

        self.embed = NoiseEmbedding(embedding)
        self.classes = ClassEmbedding(self.num_classes, embedding) if self.num_classes else None
        channels = self.shape[0] * (1 + 2 * len(self.fourier)) + self.image_channels
        self.stem = conv(channels, widths[0], 3, padding=1)

        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        current, skips = widths[0], [widths[0]]
        for level, width in enumerate(widths):
            if level:
                self.shrink.append(conv(current, current, 3, stride=2, padding=1))
                skips.append(current)
            stages = nn.ModuleList()
            for _ in range(self.blocks):
                stages.append(stage(current, width, level in self.attention))
                current = width
                skips.append(current)
            self.down.append(stages)

        self.middle = nn.ModuleList(
            [stage(current, current, True), stage(current, current, False)]
        )

        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            stages = nn.ModuleList()
            for _ in range(self.blocks + 1):
                stages.append(stage(current + skips.pop(), width, level in self.attention))
                current = width
            self.up.append(stages)
            if level:
                # Channels are reduced before the resolution doubles: a quarter of the work.
                self.grow.append(conv(current, widths[level - 1], 1))
                current = widths[level - 1]
        self.head = nn.Sequential(
            group_norm(current), nn.SiLU(), zeroed(conv(current, self.shape[0], 3, padding=1))
        )
        weights_last(self, n)

    def forward(
        self, x: Tensor, c_noise: Tensor, y: Tensor | None = None, image: Tensor | None = None
    ) -> Tensor:
        """``x (B, C, *spatial)``, ``c_noise (B,)``, conditions to the shape of ``x``.

        ``y`` are labels, ``image (B, image_channels, *spatial)`` is joined to the input.
        """
        embedding = self.embed(c_noise)
        if self.classes is not None:
            embedding = embedding + self.classes(y, len(x)).to(embedding.dtype)
        embedding = functional.silu(embedding)

        spatial = x.shape[2:]
        image = padded(image_for(x, image, self.image_channels), self.stride)
        x = fourier_features(padded(x, self.stride), torch.exp(4 * c_noise), self.fourier)
        h = self.stem(channels_last(torch.cat([x, image], 1)))
        skips = [h]
        for level, stages in enumerate(self.down):
            if level:
                h = self.shrink[level - 1](h)
                skips.append(h)
            for stage in stages:  # type: ignore[attr-defined]
                h = stage(h, embedding)
                skips.append(h)
        for stage in self.middle:
            h = stage(h, embedding)
        for level, stages in enumerate(self.up):
            for stage in stages:  # type: ignore[attr-defined]
                h = stage(torch.cat([h, skips.pop()], 1), embedding)
            if level < len(self.grow):
                h = functional.interpolate(self.grow[level](h), scale_factor=2.0)
        return cropped(self.head(h), spatial)
